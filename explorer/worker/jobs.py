"""What the worker does beside captures: maps, comparisons, weights; imports all that they need."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from capture.progress import Progress
from explorer.comparison.atlas import measure_atlas
from explorer.comparison.atlas_file import CHECKED
from explorer.comparison.compare import compare
from explorer.comparison.conditions.effects import measure_conditions
from explorer.errors import JobCancelled
from explorer.maps.make import make_clusters, make_map
from explorer.maps.map_cache import MapOptions
from explorer.maps.point_clusters import Method
from explorer.maps.rerouted import make_rerouted
from explorer.run import open_run
from explorer.worker.expert_weights import measure_cosines
from explorer.worker.requests import (
    AtlasRequest,
    CompareRequest,
    CosinesRequest,
    ProjectRequest,
    WhatIfRequest,
    refuse_unnamed_model,
)
from explorer.worker.what_if import answer_what_if, forget

Report = Callable[[Progress], None]


def run_job(
    request: AtlasRequest | CompareRequest | CosinesRequest | ProjectRequest | WhatIfRequest,
    report: Report,
    cancelled: Callable[[], bool],
) -> Path:
    """Do what a request asks; see :func:`explorer.worker.__main__.run_job`."""
    if isinstance(request, WhatIfRequest):
        return answer_what_if(request, report, cancelled)
    forget()
    if isinstance(request, CompareRequest):
        return _compare(request, report, cancelled)
    if isinstance(request, AtlasRequest):
        _refuse_unnamed_model(request)
        return measure_atlas(
            request.run,
            tokens=request.tokens,
            screen=request.screen,
            check=CHECKED if request.screen else 0,
            progress=report,
            cancelled=cancelled,
        )

    def on_progress(message: str, part: float) -> None:
        if cancelled():
            raise JobCancelled("Nothing was kept.")
        report(Progress("mapping", message=message, part=part))

    out, run = Path(request.out), request.run
    if isinstance(request, CosinesRequest):
        return measure_cosines(out, run, request.model, request.revision, on_progress)
    if request.router:
        chosen = (request.router, request.seed)
        return make_rerouted(run, request.source, out, *chosen, on_progress)
    if not request.method:
        return make_map(run, request.source, out, MapOptions(seed=request.seed), on_progress)
    how = (cast(Method, request.method), request.n_clusters, request.seed)
    return make_clusters(run, request.source, out, *how, on_progress)


def _compare(request: CompareRequest, report: Report, cancelled: Callable[[], bool]) -> Path:
    if request.live or request.layers or request.oracle or request.conditions:
        _refuse_unnamed_model(request)
    with compare(
        request.run,
        request.routers or None,
        live=request.live,
        layers=request.layers,
        replay=request.replay,
        seeds=request.seeds,
        tokens=request.tokens,
        fit_tokens=request.fit_tokens,
        controls=request.controls,
        latency=request.latency,
        oracle=request.oracle,
        progress=report,
        cancelled=cancelled,
    ) as comparison:
        path = comparison.path

    def say(what: str) -> None:
        if cancelled():
            raise JobCancelled("The conditions that were measured are in the file.", path)
        report(Progress("comparing", message=f"condition: {what}"))

    if request.conditions:
        measure_conditions(
            request.run,
            request.conditions,
            students=(),
            tokens=request.tokens,
            fit_tokens=request.fit_tokens,
            progress=say,
        )
    return path


def _refuse_unnamed_model(request: AtlasRequest | CompareRequest) -> None:
    with open_run(request.run) as run:
        refuse_unnamed_model(str(run.info["model"]), request.model)
