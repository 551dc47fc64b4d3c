"""One HTML file about a run, a demo or a comparison: nothing in it is fetched from anywhere."""

from fedmed.report.page.build import write_page

__all__ = ["write_page"]
