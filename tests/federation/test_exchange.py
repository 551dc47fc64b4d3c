"""Who is there, asking them, and what is wrong with an answer."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedmed.engines.local import LocalGrid
from fedmed.errors import FedMedError, QuorumLost, UserError
from fedmed.federation import messages as names
from fedmed.federation.exchange import Exchange, read_answer, read_update, short_reason
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Identity, Leaf, Update, code_hash, pack
from fedmed.federation.quorum import Quorum

IDENTITY = Identity("a", "classification", ("x", "y"), ("R",), (8, 8), "label", 5, code_hash=code_hash())


def site_app() -> ClientApp:
    """Nodes that identify themselves as their node config says, and echo."""
    app = ClientApp()

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        node = context.node_config
        if "plain" in node:
            raise ValueError("no such handler")
        if "refuses" in node:
            raise UserError(f"site {node['site']!r} refuses: {node['refuses']}")
        fields: dict[str, Any] = {"site": str(node["site"])}
        if "odd" in node:
            fields[str(node["odd"])] = ("other",)
        content = pack()
        config = dataclasses.replace(IDENTITY, **fields).as_config()
        content[names.IDENTITY] = names.encode_config(config)
        return Message(content, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(pack(metrics={"node": int(context.node_config["partition-id"])}), reply_to=message)

    return app


def grid(*nodes: Mapping[str, Any], **options: Any) -> LocalGrid:
    return LocalGrid(site_app(), len(nodes), {}, node_configs=nodes, **options)


def exchange(over: LocalGrid, **options: Any) -> Exchange:
    settings = {"min_sites": 2, "plain_clients": False, "start_deadline_s": 0.3, **options}
    return Exchange(over, **settings)


def test_sites_are_numbered_by_name_whatever_their_nodes(caplog: pytest.LogCaptureFixture) -> None:
    for seed in (None, 1, 2, 3):
        found = exchange(grid({"site": "c"}, {"site": "a"}, {"site": "b"}, arrival_seed=seed), min_sites=3)
        found.wait_for_sites()
        assert found.sites == ("a", "b", "c")
        assert [found.roster[s].index for s in found.sites] == [0, 1, 2]


def test_known_numbers_are_kept_and_new_sites_get_the_next() -> None:
    found = exchange(grid({"site": "c"}, {"site": "a"}, {"site": "b"}))
    found.known = {"b": 0, "gone": 4}
    found.wait_for_sites()
    assert {s: i.index for s, i in found.roster.items()} == {"b": 0, "a": 5, "c": 6}
    assert found.sites == ("b", "a", "c")


def test_replies_come_in_the_order_asked() -> None:
    for seed in (None, 5, 6):
        found = exchange(grid(*({"site": s} for s in "dbca"), arrival_seed=seed))
        found.wait_for_sites()
        requests = [(s, Message(pack(config={}), found.online[s], "train")) for s in found.sites]
        replies = list(found.replies(requests, 5.0))
        assert [r.site for r in replies] == ["a", "b", "c", "d"]
        nodes = [r.message.content["metrics"]["node"] for r in replies if r.message]
        assert nodes == [3, 1, 2, 0]


def test_late_sites_are_numbered_by_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    over = grid({"site": "c"}, {"site": "a"}, {"site": "b"})
    contexts, over._contexts = over._contexts, {1000: over._contexts[1000]}  # only c is there at first
    monkeypatch.setattr("fedmed.federation.exchange.time.sleep", lambda s: over._contexts.update(contexts))
    found = exchange(over, min_sites=3, start_deadline_s=60.0)
    found.wait_for_sites()
    assert found.sites == ("a", "b", "c") and found.num_sites == 3


def test_two_sites_of_one_name_end_a_simulation() -> None:
    with pytest.raises(UserError, match="two nodes call themselves 'a'"):
        exchange(grid({"site": "a"}, {"site": "a"}), expected=2).wait_for_sites()


def test_a_restarted_site_is_the_node_that_answered_last() -> None:
    over = grid({"site": "a"}, {"site": "b"}, {"site": "a"})
    contexts, over._contexts = over._contexts, {k: v for k, v in over._contexts.items() if k != 1002}
    found = exchange(over)
    found.wait_for_sites()
    assert found.online == {"a": 1000, "b": 1001}
    over._contexts = contexts
    found.refresh()
    assert found.online == {"a": 1002, "b": 1001} and found.roster["a"].index == 0


def test_too_few_sites_by_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(QuorumLost, match=r"1 of the 2 sites needed were online after 0\.3 s \(a\)"):
        exchange(grid({"site": "a"})).wait_for_sites()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("field", ["classes", "channels", "image_size"])
def test_sites_that_differ_end_a_simulation(field: str) -> None:
    nodes = ({"site": "a"}, {"site": "b"}, {"site": "c", "odd": field})
    with pytest.raises(
        UserError, match=f"sites differ in {field}: 'a' has .*, 'c' has .*; all sites of a run must agree"
    ):
        exchange(grid(*nodes), expected=3).wait_for_sites()


def test_a_real_site_that_differs_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    for odd in ("a", "c"):  # the majority decides, not the first by name
        nodes = ({"site": s, **({"odd": "classes"} if s == odd else {})} for s in "abc")
        found = exchange(grid(*nodes))
        with caplog.at_level(logging.WARNING, "fedmed.server"):
            found.wait_for_sites()
            found.refresh()
        assert found.sites == tuple(s for s in "abc" if s != odd) and found.num_sites == 2
        assert caplog.text.count(f"'{odd}' has ['other']") == 1  # said once
        caplog.clear()


def test_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmed.federation.admission.code_hash", lambda: "other")
    with pytest.raises(UserError, match="runs other code"):
        exchange(grid({"site": "a"}, {"site": "b"}), expected=2).wait_for_sites()
    with pytest.raises(
        QuorumLost, match=r"0 of the 2 sites .* \(none\); left out: site 'a' runs other code .*; site 'b' runs"
    ):
        exchange(grid({"site": "a"}, {"site": "b"})).wait_for_sites()


def test_too_few_sites_are_named_with_their_reasons() -> None:
    approved = {1000: "a", 1001: "b", 1002: "c", 4: "d", 5: "e"}
    nodes = ({"site": "a"}, {"site": "b", "refuses": "training.epochs=9, allowed are 2"}, {"plain": True})
    with pytest.raises(QuorumLost) as failed:
        exchange(grid(*nodes), approved=lambda: approved).wait_for_sites()
    assert str(failed.value) == (
        "1 of the 2 sites needed were online after 0.3 s (a); left out: site 'b' refuses: training.epochs=9, allowed are 2; "
        "site 'c' did not identify itself: ValueError: no such handler; not online: d, e; "
        "start the missing sites, or lower federation.min_sites"
    )


def mute(*nodes: int) -> Any:
    """An intercept: these nodes never answer, and how often each was asked is counted in `.asked`."""

    def intercept(message: Message, call: Any) -> Message | None:
        node = message.metadata.dst_node_id
        intercept.asked[node] = intercept.asked.get(node, 0) + 1  # type: ignore[attr-defined]
        return None if node in nodes else call()

    intercept.asked = {}  # type: ignore[attr-defined]
    return intercept


def test_a_mute_node_does_not_hold_the_start_up(caplog: pytest.LogCaptureFixture) -> None:
    over = grid({"site": "a"}, {"site": "b"}, {"site": "c"}, intercept=mute(1001))
    found = exchange(
        over, start_deadline_s=3600.0, identify_deadline_s=0.05, approved=lambda: {1000: "a", 1001: "b", 1002: "c"}
    )
    with caplog.at_level(logging.WARNING, "fedmed.server"):
        found.wait_for_sites()
    assert found.sites == ("a", "c")
    assert "site 'b' did not identify itself: no answer within 0.05 s" in caplog.text
    ended = exchange(grid({"site": "a"}, {"site": "b"}, intercept=mute(1001)), expected=2, identify_deadline_s=0.05)
    with pytest.raises(FedMedError, match="node 1001 did not identify itself: no answer"):
        ended.wait_for_sites()


def test_a_mute_newcomer_holds_one_round_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = mute(1002)
    over = grid({"site": "a"}, {"site": "b"}, {"site": "c"}, intercept=quiet)
    contexts, over._contexts = over._contexts, {k: v for k, v in over._contexts.items() if k != 1002}
    found = exchange(over, identify_deadline_s=0.05)
    found.wait_for_sites()
    over._contexts = contexts
    found.refresh()
    assert found.sites == ("a", "b") and quiet.asked[1002] == 1
    monkeypatch.setattr("fedmed.federation.exchange.time.sleep", lambda s: pytest.fail("waited again"))
    found.refresh()
    assert quiet.asked == {1000: 1, 1001: 1, 1002: 2}  # asked again, and not waited for


def test_a_refused_site_is_asked_again_and_joins_once_mended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    count = mute()
    over = grid({"site": "a"}, {"site": "b"}, {"site": "c", "odd": "classes"}, intercept=count)
    found = exchange(over)
    found.wait_for_sites()
    over._contexts[1002].node_config.pop("odd")  # mended; a site with a key keeps its node id
    found.refresh()
    assert found.sites == ("a", "b") and count.asked[1002] == 1  # not before the pause is over
    monkeypatch.setattr("fedmed.federation.exchange._ASK_AGAIN_S", 0.0)
    found.refresh()
    assert found.sites == ("a", "b", "c") and found.roster["c"].index == 2
    found.refresh()
    assert count.asked == {1000: 1, 1001: 1, 1002: 2}  # once per look while it is left out, never when all is well


def test_a_site_that_was_away_says_anew_who_it_is() -> None:
    over = grid({"site": "a"}, {"site": "b"}, {"site": "c"})
    found = exchange(over)
    found.wait_for_sites()
    gone = over._contexts.pop(1001)
    found.refresh()
    assert found.sites == ("a", "c")
    over._contexts[1001] = gone
    found.refresh()
    assert found.sites == ("a", "b", "c") and found.roster["b"].index == 1
    del over._contexts[1001]
    found.refresh()
    gone.node_config["odd"] = "classes"  # it comes back with other data
    over._contexts[1001] = gone
    found.refresh()
    assert found.sites == ("a", "c")


def test_a_name_belongs_to_the_key_it_was_approved_with(caplog: pytest.LogCaptureFixture) -> None:
    approved = {1000: "a", 1001: "b", 1002: "c"}
    found = exchange(grid({"site": "a"}, {"site": "a"}, {"site": "other"}), approved=lambda: approved, min_sites=1)
    with caplog.at_level(logging.WARNING, "fedmed.server"):
        found.wait_for_sites()
    assert found.online == {"a": 1000}
    assert "site 'b' calls itself 'a'; `name` in its site.yaml must be the one it was approved under" in caplog.text
    assert "site 'c' calls itself 'other'" in caplog.text


def test_a_node_that_nobody_approved_takes_no_part_until_somebody_does(caplog: pytest.LogCaptureFixture) -> None:
    approved = {1000: "a"}
    found = exchange(grid({"site": "a"}, {"site": "b"}), approved=lambda: approved, min_sites=1)
    with caplog.at_level(logging.WARNING, "fedmed.server"):
        found.wait_for_sites()
    assert found.sites == ("a",)
    assert "node 1001 ('b') was never approved" in caplog.text
    approved[1001] = "b"
    found.refresh()
    assert found.sites == ("a", "b")


def test_a_node_that_goes_offline_while_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    over = grid({"site": "a"}, {"site": "b"}, {"site": "c"})
    push = over.push_messages
    monkeypatch.setattr(over, "push_messages", lambda messages: [*list(push(messages))[:2], ""])  # as Flower says it
    found = exchange(over, start_deadline_s=60.0)
    found.wait_for_sites()
    assert found.sites == ("a", "b")


def test_a_plain_client_is_left_out_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    nodes = ({"site": "a"}, {"site": "b"}, {"plain": True})
    with caplog.at_level(logging.WARNING, "fedmed.server"):
        found = exchange(grid(*nodes))
        found.wait_for_sites()
    assert found.sites == ("a", "b") and "plain_clients=true" in caplog.text
    with pytest.raises(FedMedError, match="node 1002 did not identify itself: ValueError: no such handler"):
        exchange(grid(*nodes), expected=3).wait_for_sites()
    accepted = exchange(grid(*nodes), plain_clients=True, expected=3)
    accepted.wait_for_sites()
    assert accepted.sites == ("a", "b", "node-1002") and accepted.roster["node-1002"].plain


def test_identity_survives_the_wire() -> None:
    for identity in (IDENTITY, dataclasses.replace(IDENTITY, groups_left_out=("head",), classes=())):
        assert Identity.from_config(dict(names.encode_config(identity.as_config()))) == identity


def test_a_site_says_of_itself_only_what_is_its_to_say() -> None:
    sent = {
        **names.encode_config(IDENTITY.as_config()),
        "plain": True,
        "index": 7,
        "node_id": 9,
        "of_a_later_version": 1,
    }
    assert Identity.from_config(sent) == IDENTITY  # else `plain` would pass by the check of the code
    with pytest.raises(TypeError):
        Identity.from_config({name: value for name, value in sent.items() if name != "task"})


# ---------------------------------------------------------------------- reading answers

MODEL = nn.BatchNorm1d(2)
LAYOUT = Layout.of(MODEL, lambda name, module: False)
STATE = {n: v.clone() for n, v in MODEL.state_dict().items()}


def read(**parts: Any) -> Update | str:
    content = {"arrays": STATE, "metrics": {"num-examples": 3, "train_loss": 0.5}, **parts}
    return read_update(pack(**content), dataclasses.replace(IDENTITY, index=2), LAYOUT)


def test_a_good_update() -> None:
    update = read(extras={"c": torch.ones(2)})
    assert isinstance(update, Update)
    assert (update.site, update.index, update.num_examples, update.metrics) == ("a", 2, 3, {"train_loss": 0.5})
    assert list(update.arrays) == list(STATE) and update.extras["c"].tolist() == [1.0, 1.0]


def test_nothing_to_train_on_is_heard_and_not_summed() -> None:
    for arrays in (None, STATE):
        update = read(arrays=arrays, metrics={"num-examples": 0})
        assert isinstance(update, Update) and update.num_examples == 0 and update.arrays == {}


def test_where_nothing_travels_an_update_has_no_arrays() -> None:
    layout = Layout.of(MODEL, lambda name, module: True)
    for arrays in (None, {}):
        update = read_update(pack(arrays=arrays, metrics={"num-examples": 3}), IDENTITY, layout)
        assert isinstance(update, Update) and update.num_examples == 3 and update.arrays == {}
    sent = read_update(pack(arrays=STATE, metrics={"num-examples": 3}), IDENTITY, layout)
    assert str(sent).startswith("unexpected entry")


@pytest.mark.parametrize("count", [-1, 0.5, math.nan, math.inf, [3]])
def test_impossible_counts(count: object) -> None:
    assert "num-examples: expected a whole number >= 0" in str(read(metrics={"num-examples": count}))


def test_a_whole_float_is_a_count() -> None:
    update = read(metrics={"num-examples": 3.0})
    assert isinstance(update, Update) and type(update.num_examples) is int


def without(name: str) -> dict[str, torch.Tensor]:
    return {n: v for n, v in STATE.items() if n != name}


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"metrics": None}, "the reply has no 'metrics' record"),
        ({"metrics": {"train_loss": 1.0}}, "num-examples: expected a whole number >= 0, got None"),
        ({"arrays": None}, "the reply has no 'arrays' record"),
        ({"arrays": without("bias")}, "entry 'bias' is missing"),
        ({"arrays": {**STATE, "more": torch.ones(1)}}, "unexpected entry 'more'"),
        ({"arrays": {**STATE, "bias": torch.ones(3)}}, "expected shape (2,), got (3,)"),
        ({"arrays": {**STATE, "bias": torch.tensor([1.0, math.nan])}}, "entry 'bias' holds NaN or infinite values"),
        ({"arrays": {**STATE, "bias": torch.tensor([1.0, math.inf])}}, "entry 'bias' holds NaN or infinite values"),
    ],
)
def test_broken_updates_are_described(parts: dict[str, Any], problem: str) -> None:
    assert problem in str(read(**parts))


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (2,), "numpy.ndarray", b"no array at all"),
        Array("float32", (2,), "other.type", b""),
        Array("str", (1,), "numpy.ndarray", Array(torch.ones(1).numpy().astype("U1")).data),
    ],
)
def test_bytes_that_are_no_array_are_a_broken_update(array: Array) -> None:
    record = ArrayRecord()
    for name, value in STATE.items():
        record[name] = array if name == "bias" else Array(value.numpy())
    assert "the arrays cannot be read" in str(read(arrays=record))


def test_answers_to_queries() -> None:
    answer = read_answer(pack(metrics={"class_loss": [1.0, math.nan], "num-examples": 4}), IDENTITY)
    assert not isinstance(answer, str)
    assert (answer.site, answer.num_examples, answer.metrics["class_loss"][0]) == ("a", 4, 1.0)  # type: ignore[index]
    assert read_answer(pack(), IDENTITY) == "the reply has no 'metrics' record"


# ---------------------------------------------------------------------- quorum and small things


def quorum(asked: int, share: float) -> Quorum:
    return Quorum("training", 3, asked, share, lambda: "how to go on")


@pytest.mark.parametrize(
    ("asked", "share", "needed"), [(4, 0.5, 2), (5, 0.5, 3), (30, 0.1, 3), (3, 0.0, 1), (0, 0.5, 1), (7, 1.0, 7)]
)
def test_how_many_are_needed(asked: int, share: float, needed: int) -> None:
    assert quorum(asked, share).needed == needed


def test_quorum_lost_names_who_failed_and_how_to_go_on() -> None:
    short = quorum(4, 0.5)
    short.valid, short.failures = 1, ["b: late", "c: raised"]
    with pytest.raises(
        QuorumLost, match=r"round 3, training: 1 valid .* of 4 asked, 2 needed \(b: late; c: raised\)\. how to go on"
    ):
        short.check()
    short.valid = 2
    short.check()


def test_one_fault_of_the_users_at_all_sites_is_said_once() -> None:
    short = quorum(2, 0.5)
    short.failures = ["a: UserError: client.args.loss: no", "b: UserError: client.args.loss: no"]
    with pytest.raises(UserError, match=r"^client\.args\.loss: no \(all 2 sites answered this"):
        short.check()
    for failures in (short.failures[:1], ["a: UserError: x", "b: UserError: y"], ["a: RuntimeError: x"] * 2):
        short.failures = failures
        with pytest.raises(QuorumLost):
            short.check()


def test_short_reason_is_the_last_line() -> None:
    assert short_reason("Traceback ...\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert short_reason(" \n") == "no reason given" and len(short_reason("x" * 999)) == 300


@pytest.mark.parametrize(
    ("leaf", "name", "covered"),
    [
        ("a", "a", True),
        ("a", "ab", False),
        ("loss/*", "loss/ce", True),
        ("loss/*", "loss/", False),
        ("l_*_x", "l_1_x", True),
    ],
)
def test_leaves_cover_names(leaf: str, name: str, covered: bool) -> None:
    assert Leaf(leaf, "1", "").covers(name) is covered
