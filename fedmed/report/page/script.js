// Names in legends become buttons that pick out a line in all figures and tables; on paper, everything is unfolded.
(function () {
  "use strict";
  var marked = Array.prototype.slice.call(document.querySelectorAll("[data-series]"));
  var pinned = null;

  function show(number) {
    document.body.classList.toggle("focus", number !== null);
    marked.forEach(function (node) {
      node.classList.toggle("lit", number !== null && node.getAttribute("data-series") === number);
    });
  }

  function pin(number) {
    pinned = pinned === number ? null : number;
    document.querySelectorAll(".key").forEach(function (key) {
      key.setAttribute("aria-pressed", String(key.getAttribute("data-series") === pinned));
    });
    show(pinned);
  }

  document.querySelectorAll(".key").forEach(function (key) {
    key.setAttribute("role", "button");
    key.setAttribute("tabindex", "0");
    key.setAttribute("aria-pressed", "false");
    key.addEventListener("keydown", function (event) {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        pin(key.getAttribute("data-series"));
      }
    });
  });
  marked.forEach(function (node) {
    var number = node.getAttribute("data-series");
    if (node.tagName.toLowerCase() !== "tr") {
      node.addEventListener("click", function () { pin(number); });
    }
    node.addEventListener("mouseenter", function () { show(number); });
    node.addEventListener("mouseleave", function () { show(pinned); });
  });

  var opened = [];
  window.addEventListener("beforeprint", function () {
    opened = Array.prototype.slice.call(document.querySelectorAll("details:not([open])"));
    opened.forEach(function (node) { node.open = true; });
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (node) { node.open = false; });
  });
})();
