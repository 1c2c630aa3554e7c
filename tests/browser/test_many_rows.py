"""A report of five thousand rows is as light as one of ten."""

from pathlib import Path

import pytest
from gallery import add_many, clip, job_of, row

from browser.conftest import until
from ditflow.media.video import encode_video
from pipeline.report import write_report
from pipeline.report.rows import ROWS_PER_FILE
from pipeline.store import Store

ROWS, CARDS = 5000, 24


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory) -> Path:
    store = Store(str(tmp_path_factory.mktemp("many") / "out"))
    video = store.put("videos/one.mp4", encode_video(clip(), 8.0)).uri
    names = [f"method-{number}" for number in range(5)]
    rows = [
        row(store, number, output_uri=video, variant=names[number % 5], prompt=f"prompt {number // 5}", seed=1)
        for number in range(ROWS)
    ]
    add_many(store, rows)
    write_report(job_of(store), False)
    return Path(store.uri.removeprefix("file://"))


def loaded(page) -> int:
    return page.evaluate("ditflowReport.filesLoaded")


def cards(page) -> int:
    return page.locator(".card").count()


def test_only_the_rows_that_are_shown_are_loaded_and_in_the_document(look, job_folder):
    files = len(list((job_folder / "report/data").glob("rows-*.js")))
    assert files == ROWS // ROWS_PER_FILE
    with look() as page:
        assert "5,000 rows" in page.locator("#found").inner_text()
        assert (loaded(page), cards(page)) == (1, CARDS)
        page.locator(".next").first.click()
        until(page, "document.querySelector('.page').textContent.startsWith('2 ')")
        assert (loaded(page), cards(page)) == (1, CARDS)
        page.locator("#q").fill("prompt 999")
        until(page, "document.querySelectorAll('.card').length === 5")
        assert loaded(page) == 2
        assert page.evaluate("document.querySelectorAll('*').length") < 3000


def test_videos_are_fetched_only_near_the_window(look):
    held = "[...document.querySelectorAll('video')].map(video => video.hasAttribute('src'))"
    with look() as page:
        page.locator(".card").first.scroll_into_view_if_needed()
        until(page, f"{held}[0]")
        assert not page.evaluate(held)[-1]
        page.locator(".card").last.scroll_into_view_if_needed()
        until(page, f"{held}.at(-1) && !{held}[0]")


def test_sorting_all_rows_loads_only_what_the_first_page_needs(look):
    with look("sort=ended&down=1") as page:
        assert (loaded(page), cards(page)) == (1, CARDS)
        assert page.locator(".card h3").first.inner_text() == "prompt 999"
        assert page.locator(".page").first.inner_text() == f"1 / {-(-ROWS // CARDS)}"
