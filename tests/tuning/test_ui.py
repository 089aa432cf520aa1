"""MLflow's pages over a finished sweep, in a real browser against a real server."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers import serving
from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tuning.tracking.store import local_tracking_uri
from tuning.ui import CHARTS_VIEW, CURVES, CURVES_VIEW, METRICS, STUDIES_VIEW, main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver on this machine"
)


@pytest.fixture(scope="module")
def served(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server that `make ui` starts, over the store of the finished sweep."""
    command = [sys.executable, "-m", "tuning.ui"]
    log = tmp_path_factory.mktemp("ui") / "log"
    with serving(command, log, "health", folder=finished[0]) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    flags = (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
    )
    for flag in (*flags, "disable-component-update", "disable-sync", "window-size=1900,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_page_load_timeout(PATIENCE)
    try:
        yield driver
    finally:
        driver.quit()


def runs(folder: Path) -> tuple[str, list[str]]:
    """The experiment and the trials of the finished sweep."""
    client = MlflowClient(local_tracking_uri(folder))
    experiment = client.get_experiment_by_name("llgbm")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return experiment.experiment_id, [
        r.info.run_id for r in found if "mlflow.parentRunId" in r.data.tags
    ]


def open_view(
    browser: webdriver.Chrome, served: str, experiment: str, view: str, mode: str = ""
) -> None:
    browser.get(f"{served}/#/experiments/{experiment}/runs?viewStateShareKey={view}{mode}")


def text_of(browser: webdriver.Chrome) -> str:
    """What the page says, the titles of its charts among it."""
    return str(browser.execute_script("return document.body.textContent"))


def wait_for(browser: webdriver.Chrome, *wanted: str) -> None:
    """Until all these texts are on the page."""
    WebDriverWait(browser, PATIENCE).until(
        lambda b: all(text in text_of(b) for text in wanted), f"{wanted} not shown"
    )


def wait_until_drawn(browser: webdriver.Chrome, axes: set[str]) -> None:
    """Until a chart has axes of these names (drawn as text in an SVG, not as a label of a control)."""
    titles = "return [...document.querySelectorAll('svg text')].map(t => t.textContent)"
    WebDriverWait(browser, PATIENCE).until(
        lambda b: axes <= set(b.execute_script(titles)), f"no axes {axes}"
    )


@pytest.mark.whole
@needs_browser
def test_runs_are_nested_named_and_show_what_matters(
    finished: tuple[Path, str], served: str, browser: webdriver.Chrome
) -> None:
    experiment, children = runs(finished[0])
    open_view(browser, served, experiment, STUDIES_VIEW)
    wait_for(browser, "phase_4_5", "matching runs", *METRICS[:2])
    assert "multitask, seed 0" not in text_of(browser)
    browser.find_element(By.CSS_SELECTOR, ".ag-cell button[type='button']").click()
    wait_for(browser, "multitask, seed 0", "delta-only, seed 0", "weight-only, seed 0")
    assert len(children) == 3


@pytest.mark.whole
@needs_browser
def test_the_charts_have_parallel_coordinates_over_lambdas_seed_and_held_out_accuracy(
    finished: tuple[Path, str], served: str, browser: webdriver.Chrome
) -> None:
    experiment, _ = runs(finished[0])
    open_view(browser, served, experiment, CHARTS_VIEW, "&compareRunsMode=CHART")
    wait_for(
        browser, "LLGBM: λ, seed and held-out accuracy", "multitask, seed 0", "weight-only, seed 0"
    )
    wait_until_drawn(browser, {"lambda_weight", "lambda_delta", "heldout/accuracy"})


@pytest.mark.whole
@needs_browser
def test_curves_are_means_of_configurations_within_bands(
    finished: tuple[Path, str], served: str, browser: webdriver.Chrome
) -> None:
    experiment, _ = runs(finished[0])
    open_view(browser, served, experiment, CURVES_VIEW, "&compareRunsMode=CHART")
    wait_for(browser, "Group by: llgbm.config", "Group: multitask", *CURVES[:2])
    bands = "return document.querySelectorAll('.scatterlayer .fills path.js-fill').length"
    WebDriverWait(browser, PATIENCE).until(lambda b: b.execute_script(bands) >= 3, "no bands")


@pytest.mark.whole
@needs_browser
def test_the_compare_page_shows_parallel_coordinates(
    finished: tuple[Path, str], served: str, browser: webdriver.Chrome
) -> None:
    experiment, children = runs(finished[0])
    asked = f"runs={quote(json.dumps(children))}&experiments={quote(json.dumps([experiment]))}"
    browser.get(f"{served}/#/compare-runs?{asked}")
    wait_for(
        browser, "Comparing 3 Runs", "Parallel Coordinates Plot", "lambda_delta", "lambda_weight"
    )
    wait_until_drawn(browser, {"lambda_weight", "lambda_delta", "heldout/accuracy"})
    box = browser.find_elements(By.CSS_SELECTOR, "input[type='search']")[0]
    box.send_keys("seed", Keys.ENTER)
    wait_until_drawn(browser, {"lambda_weight", "lambda_delta", "seed", "heldout/accuracy"})


@pytest.mark.whole
def test_only_this_machine_is_served(served: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but its own")
        address = outward.getsockname()[0]
    with pytest.raises(OSError):
        socket.create_connection((address, int(served.rpartition(":")[2])), timeout=5).close()


def test_without_a_store_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "no MLflow store" in capsys.readouterr().err and not list(tmp_path.iterdir())
