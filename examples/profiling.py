"""Record a trace of two replicas with torch.profiler: local computation and collectives side by side.

torchrun --standalone --nproc-per-node 2 examples/profiling.py --folder traces
torchrun --standalone --nproc-per-node 2 examples/profiling.py --folder traces --overlap 2

The second lets the mean of a sync step travel during the next two steps.

Open ``traces/rank0.json`` and ``traces/rank1.json`` in https://ui.perfetto.dev. The ranges ``curvadion::...`` are those
of the optimizer; collectives have rows of their own (``gloo:...``; with NCCL they are kernels on another stream).
Rank 0 also prints the share of time of each phase.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters

WARM_UP, RECORDED = 4, 12
# Indented phases are parts of those above them.
PHASES = {
    "forward": "forward",
    "backward": "backward",
    "RMMC": "curvadion::rmmc",
    "agreement": "curvadion::agreement",
    "local step": "curvadion::local_step",
    "sync step": "curvadion::sync_step",
    "  quantize": "curvadion::quantize",
    "  collective": "curvadion::collective",
    "  dequantize": "curvadion::dequantize",
    "send": "curvadion::send",
    "merge": "curvadion::merge",
}
COMPUTING = ("forward", "backward", "curvadion::rmmc", "curvadion::local_step")
Spans = list[tuple[float, float]]


def train(folder: Path, device: torch.device, lag: int | None = None, overlap: int | None = None) -> profile:
    """Train a small model and write this rank's trace; ``None`` is the hook's default."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.ReLU())), nn.Linear(128, 10))
    model.to(device)
    optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(4))
    delays: dict[str, Any] = {name: n for name, n in (("lag", lag), ("overlap", overlap)) if n is not None}
    optimizer.register_sync_hook(ProcessGroupSync(**delays))
    torch.manual_seed(dist.get_rank())
    recorder = profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])],
        schedule=schedule(wait=0, warmup=WARM_UP, active=RECORDED, repeat=1),
        on_trace_ready=lambda recorder: recorder.export_chrome_trace(str(folder / f"rank{dist.get_rank()}.json")),
    )
    with recorder:
        for _ in range(WARM_UP + RECORDED):
            x = torch.randn(1024, 128, device=device)
            optimizer.zero_grad()
            with record_function("forward"):
                loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(dim=1))
            with record_function("backward"):
                loss.backward()
            optimizer.step()
            recorder.step()
    return recorder


def spans_of(recorder: profile, *names: str) -> Spans:
    """Start and end of every event whose name begins with one of the names, in microseconds."""
    return [
        (event.time_range.start, event.time_range.end) for event in recorder.events() if event.name.startswith(names)
    ]


def spans_on_gpu(recorder: profile) -> tuple[Spans, Spans]:
    """Start and end of every kernel: NCCL's, and all others but copies."""
    ours: Spans = []
    of_nccl: Spans = []
    for event in recorder.events():
        is_copy = event.name.startswith(("Memcpy", "Memset"))
        if event.device_type.name == "CUDA" and not event.is_user_annotation and not is_copy:
            span = event.time_range.start, event.time_range.end
            (of_nccl if event.name.startswith("nccl") else ours).append(span)
    return of_nccl, ours


def total(spans: Spans) -> float:
    """The length of the spans together."""
    return sum(end - start for start, end in spans)


def common(some: Spans, others: Spans) -> Spans:
    """Where spans lie within others."""
    both = [(max(a, c), min(b, d)) for a, b in some for c, d in others]
    return [(start, end) for start, end in both if start < end]


def report(recorder: profile) -> str:
    """The share of time of each phase, and how much of the collectives lay beside computation."""
    steps = total(spans_of(recorder, "ProfilerStep"))
    lines = [f"{'phase':14}{'ms a step':>10}{'share':>8}"]
    for phase, name in PHASES.items():
        if not (spans := spans_of(recorder, name)):
            continue
        spent = total(spans)
        lines.append(f"{phase:14}{spent / 1e3 / RECORDED:10.2f}{spent / steps:8.1%}")
    of_nccl, kernels = spans_on_gpu(recorder)
    collectives = of_nccl or spans_of(recorder, "gloo:")
    beside = total(common(collectives, kernels or spans_of(recorder, *COMPUTING)))
    taken = total(collectives) / steps
    lines.append(f"collectives took {taken:.1%} of the time; {beside / steps:.1%} beside computation")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("traces"), help="where the traces go")
    parser.add_argument("--lag", type=int, help="steps after which an agreement is read")
    parser.add_argument("--overlap", type=int, help="steps that the mean of a sync step may take")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    recorder = train(options.folder, torch.device("cpu"), options.lag, options.overlap)
    if dist.get_rank() == 0:
        print(report(recorder))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
