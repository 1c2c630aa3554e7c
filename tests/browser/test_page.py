"""What a person finds in a report, in a real Chromium, from the disk and from a web server."""

import json
from pathlib import Path

import pytest
from gallery import FAILED, add_motion, add_reference, add_row, clip, job_of, row, row_id, used

from browser.conftest import PHONE, until
from ditflow.metrics.base import MetricSettings
from pipeline.measurements import Figure, Measurements
from pipeline.report import write_report
from pipeline.store import Store

FLOW, PLAIN, BROKEN, GIVEN_UP, SCRIPT = map(row_id, range(5))
SCRIPT_PROMPT = "<script>alert(1)</script> a ring"
REASON = "<b>bold</b>: damaged </script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory) -> Path:
    """Five rows: two methods on one reference, a failed one, a quarantined one, and a prompt that would be code."""
    folder = tmp_path_factory.mktemp("gallery")
    store, reference = Store(str(folder / "out")), used(add_reference(folder))
    plain = {**json.loads(row(store, 0)["spec_json"]), "method": {"name": "none"}}
    add_row(store, 0, **reference, video=clip(1), prompt="a red ball", category="caption", amf_uri=add_motion(store))
    add_row(
        store, 1, **reference, video=clip(2, frames=5), fps=4.0, variant="plain", method="none", prompt="a red ball",
        category="caption", spec_json=json.dumps(plain), losses=[], loss_first=None, loss_final=None,
    )  # fmt: skip
    add_row(store, 2, **reference, **{**FAILED, "error_message": REASON}, prompt="a star", category="scene")
    add_row(
        store, 3, **{**FAILED, "status": "quarantined", "error_kind": "worker_died"}, attempts=3, prompt="a cross",
        reference_uri=f"file://{folder}/gone.mp4", reference_sha256="0" * 64,
    )  # fmt: skip
    add_row(store, 4, video=clip(0), prompt=SCRIPT_PROMPT, category="scene")
    for number, value in ((0, 0.9), (1, 0.2), (4, 0.5)):
        figures = [Figure("motion_fidelity", "motion_fidelity", value)]
        Measurements(store).write(row_id(number), MetricSettings(names=("motion_fidelity",)), figures)
    write_report(job_of(store), True)
    return folder / "out"


def ids(page) -> list[str]:
    return page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.id)")


def card(page, its_id: str):
    return page.locator(f'.card[data-id="{its_id}"]')


def wait_for(page, shown: list[str]) -> None:
    """Wait until these rows are shown, in this order."""
    ids = "JSON.stringify([...document.querySelectorAll('.card')].map(card => card.dataset.id))"
    until(page, f"{ids} === JSON.stringify({json.dumps(shown)})")


def shares(page, its_id: str) -> str:
    """JavaScript: which share of each of a card's videos is over."""
    return f"[...document.querySelectorAll('.card[data-id=\"{its_id}\"] video')].map(v => v.currentTime / v.duration)"


def test_every_row_is_shown_with_its_reason_or_its_videos(look):
    with look() as page:
        assert set(ids(page)) == {FLOW, PLAIN, BROKEN, GIVEN_UP, SCRIPT}
        assert page.locator("h1").inner_text() == "gallery"
        counts = page.locator("#statuses button").all_inner_texts()
        assert [text.split() for text in counts] == [
            ["5", "rows"],
            ["3", "ok"],
            ["1", "failed"],
            ["1", "quarantined"],
        ]
        assert card(page, FLOW).locator("video").count() == 2
        assert "worker died after 3 attempts" in card(page, GIVEN_UP).inner_text()
        assert "does not exist" in card(page, GIVEN_UP).inner_text(), "the reference is gone, and a note tells so"


def test_texts_of_others_are_shown_as_texts(look):
    with look() as page:
        assert card(page, SCRIPT).locator("h3").inner_text() == SCRIPT_PROMPT
        assert REASON in card(page, BROKEN).locator(".reason").inner_text()
        assert page.locator(".reason b, .card img, .card script").count() == 0


@pytest.mark.parametrize("its_id", [FLOW, PLAIN])
def test_reference_and_result_play_in_step_whatever_their_lengths(look, its_id):
    with look() as page:
        card(page, its_id).locator(".play").click()
        both = shares(page, its_id)
        until(page, f"(() => {{ const [a, b] = {both}; return a > 0.2 && b > 0.2 && Math.abs(a - b) < 0.06; }})()")
        assert card(page, its_id).locator(".play").get_attribute("aria-label") == "Pause"
        card(page, its_id).locator(".play").click()
        stopped = page.evaluate(both)
        assert stopped[0] == pytest.approx(stopped[1], abs=0.01)
        assert page.evaluate(f"document.querySelectorAll('.card[data-id=\"{its_id}\"] video')[0].paused")


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_seeking_moves_both_videos(look, share):
    with look() as page:
        slider = card(page, PLAIN).locator("input[type=range]")
        card(page, PLAIN).scroll_into_view_if_needed()
        until(page, f"{shares(page, PLAIN)}.every(share => share >= 0)")
        slider.fill(str(int(1000 * share)))
        until(page, f"{shares(page, PLAIN)}.every(share => Math.abs(share - {share}) < 0.01)")


def test_videos_start_over_together(look):
    with look() as page:
        until(page, f"{shares(page, FLOW)}.every(share => share >= 0)")
        card(page, FLOW).locator("input[type=range]").fill("900")
        card(page, FLOW).locator(".play").click()
        until(page, f"{shares(page, FLOW)}.every(share => share > 0.05 && share < 0.6)")


def test_arrows_are_drawn_over_the_reference_where_there_is_a_flow(look):
    ink = """id => {
        const canvas = document.querySelector(`.card[data-id="${id}"] canvas`);
        if (canvas.hidden || !canvas.width) return 0;
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((value, n) => n % 4 === 3 && value > 0).length;
    }"""
    with look() as page:
        assert page.evaluate(ink, FLOW) == 0
        page.locator("#arrows").click()
        until(page, f"({ink})({json.dumps(FLOW)}) > 100")
        assert page.evaluate(ink, PLAIN) == 0
        assert "no flow" in card(page, PLAIN).inner_text()
        assert page.locator("#arrows").get_attribute("aria-pressed") == "true"
        page.locator("#arrows").click()
        until(page, f"({ink})({json.dumps(FLOW)}) === 0")


def test_play_all_plays_all_and_stops_all(look):
    playing = "[...document.querySelectorAll('video[src]')].filter(video => !video.paused).length"
    with look(size=(1280, 3000)) as page:
        page.locator("#play").click()
        until(page, f"{playing} >= 4")
        page.locator("#play").click()
        until(page, f"{playing} === 0")


def test_filters_keep_the_rows_that_are_asked_for_and_the_address_tells_them(look):
    with look() as page:
        page.locator("#method").select_option("plain")
        wait_for(page, [PLAIN])
        assert "method=plain" in page.url
        page.locator("#reset").click()
        page.locator("#category").select_option("scene")
        wait_for(page, [BROKEN, SCRIPT])
        page.locator("#q").fill("RING a")
        wait_for(page, [SCRIPT])
        address = page.url
        page.locator("#reset").click()
        page.locator("#statuses .failed").click()
        wait_for(page, [BROKEN])
        page.locator("#status").select_option("quarantined")
        wait_for(page, [GIVEN_UP])
        page.go_back()
        wait_for(page, [BROKEN])
        page.locator("#q").fill("no such words")
        until(page, "document.querySelectorAll('.card').length === 0")
        assert "No row of 5 matches" in page.locator("#found").inner_text()
    with look(address.partition("#")[2]) as page:
        assert ids(page) == [SCRIPT]
        until(page, "scrollY > 0")
        assert page.locator("#q").input_value() == "RING a"
        assert page.locator("#category").input_value() == "scene"


def test_a_range_keeps_rows_by_loss_or_metric(look):
    with look() as page:
        page.locator("#by").select_option("metric:motion_fidelity")
        page.locator("#from").fill("0.4")
        wait_for(page, [FLOW, SCRIPT])
        page.locator("#to").fill("0.6")
        wait_for(page, [SCRIPT])
        page.locator("#by").select_option("loss_final")  # 0.2 of row 0, 0.6 of row 4
        page.locator("#from").fill("0")
        page.locator("#to").fill("0.3")
        wait_for(page, [FLOW])


def test_rows_are_sorted_and_those_without_a_value_come_last(look):
    with look("sort=metric:motion_fidelity") as page:
        assert ids(page) == [PLAIN, SCRIPT, FLOW, BROKEN, GIVEN_UP]
        page.locator("#down").click()
        wait_for(page, [FLOW, SCRIPT, PLAIN, BROKEN, GIVEN_UP])
        page.locator("#sort").select_option("prompt")
        wait_for(page, [BROKEN, FLOW, PLAIN, GIVEN_UP, SCRIPT])


def test_a_card_tells_losses_times_metrics_and_settings(look):
    with look(f"q={FLOW}") as page:
        assert ids(page) == [FLOW]
        shown = card(page, FLOW)
        assert "10 iterations, 2 steps" in shown.locator(".loss").inner_text()
        assert shown.locator(".curve .band").count() == 1
        assert "guidance 3 s" in shown.locator(".times").inner_text()
        assert "0.9" in shown.locator(".facts").inner_text()
        shown.locator("summary").click()
        numbers = shown.locator(".numbers").inner_text()
        for told in (FLOW, "square.mp4", "sampling: steps\n8", "9 frames of 32 x 32"):
            assert told in numbers


def test_the_summary_has_a_line_for_every_method(look):
    with look() as page:
        summary = page.locator("#charts")
        assert summary.locator(".wide tbody th").all_inner_texts() == ["flow", "plain"]
        assert "0.7" in summary.locator(".wide tbody tr").first.inner_text()
        assert "Seconds per row" in summary.inner_text()


@pytest.mark.parametrize("view", ["", f"q={BROKEN}"])
def test_a_phone_shows_it_without_scrolling_sideways(look, view):
    with look(view, size=PHONE, has_touch=True, is_mobile=True) as page:
        page.locator("#summary > summary").click()
        for details in page.locator(".card details").all():
            details.evaluate("details => { details.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]


def test_dark_and_light_follow_the_system_and_motion_is_spared_if_asked(look):
    ground = "getComputedStyle(document.body).backgroundColor"
    with look(color_scheme="dark", reduced_motion="reduce") as page:
        dark = page.evaluate(ground)
        assert page.evaluate("getComputedStyle(document.querySelector('button')).transitionDuration") == "0s"
        assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.paused)")
    with look(color_scheme="light") as page:
        light = page.evaluate(ground)
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (dark, light)]
    assert brightness[0] < 150 < 600 < brightness[1]


def test_everything_can_be_reached_and_is_named_without_a_mouse(look):
    unnamed = """[...document.querySelectorAll('button, input, select, video')]
        .filter(e => !e.getAttribute('aria-label') && !e.labels?.length && !e.textContent.trim())
        .map(e => e.outerHTML)"""
    with look() as page:
        assert page.evaluate(unnamed) == []
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "play"
        page.keyboard.press("Enter")
        until(page, "document.activeElement.getAttribute('aria-label') === 'Pause'")
