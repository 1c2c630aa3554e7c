"""Facts about `Worker`: what it loads, and the way of working that needs less memory."""

import json

import pytest

from ditflow.backbones import identify
from ditflow.settings import ExecutionSettings
from pipeline.job import Job, Model, Output
from pipeline.stages.worker import ModelChangedError, Worker


def job(**execution) -> Job:
    return Job("synthesize", "test", Output("/nowhere"), Model("mini", execution=ExecutionSettings(**execution)))


def test_the_lighter_way_is_taken_for_its_length_and_recorded():
    worker = Worker(job(), identify("mini").revision)
    usual = worker.backbone.execution
    assert worker.lighter is not None
    with worker.lighter():
        told = json.loads(worker.facts()["execution_json"])
        assert (told["checkpointing"], told["cfg"], told["vae_tiling"]) == ("on", "serial", "on")
        assert worker.backbone.vae.use_tiling
        assert worker.lighter is None
    assert worker.backbone.execution == usual
    assert not worker.backbone.vae.use_tiling


def test_the_usual_way_comes_back_after_an_error():
    worker = Worker(job(), identify("mini").revision)
    usual = worker.backbone.execution
    with pytest.raises(MemoryError), worker.lighter():
        raise MemoryError
    assert worker.backbone.execution == usual


def test_there_is_no_lighter_way_than_the_lightest():
    worker = Worker(job(checkpointing="on", cfg="serial", vae_tiling="on"), identify("mini").revision)
    assert worker.lighter is None


def test_another_model_than_the_planned_one_is_refused():
    with pytest.raises(ModelChangedError, match="planned with 0123"):
        Worker(job(), "0123")
