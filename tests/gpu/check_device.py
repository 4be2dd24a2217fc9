"""What a GPU does with CurvaDion: parity with the CPU, time of a step, waits of the host, and overlap.

    python tests/gpu/check_device.py                        # a GPU of 40 GB or more, ten minutes
    python tests/gpu/check_device.py --smoke --device cpu   # tiny sizes, which CI runs

Ends with an error where parity is lost or the host waits more than once in a local step. The times are medians,
beside AdamW and Muon of torch. With several GPUs the trace of the last part is NCCL's, one
process on each. With one GPU two processes share it through gloo, whose collectives pass the host: such a trace shows
whether collectives lie beside kernels, and not how fast NCCL is. With ``--smoke`` on a CPU the numbers mean nothing.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from examples import profiling
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters

PARITY_STEPS = 20
PARITY_SIZE = (2, 64, 128)
# Muon computes in bfloat16 on a GPU, which moves parameters 1.3 % differently in 20 steps of the tests' model.
LARGEST_DIFFERENCE = {"muon": 0.05, "dion": 0.01, "sgd": 0.001}
# Layers, width, rows of the embedding: GPT-2 small (124 M with positions), and a GPT of 1.0 B.
SIZES = {"124 M": (12, 768, 50257 + 1024), "1.0 B": (18, 2048, 50304)}
SMOKE_SIZES = {"smoke": (2, 32, 64)}
# What the CUDA runtime calls a wait. A copy to the host waits too, and one from pageable memory.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_COPIES = ("Memcpy DtoH", "Memcpy HtoD (Pageable")


class GPT(nn.Module):
    """The parameters of a GPT whose output head is its embedding."""

    def __init__(self, layers: int, width: int, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norms": nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)]),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; without attention, which is no business of an optimizer."""
        x = self.embedding(tokens)
        for layer in self.layers:
            query, key, value = layer["qkv"](layer["norms"][0](x)).chunk(3, dim=-1)
            x = x + layer["out"](torch.tanh(query) * torch.tanh(key) * value)
            x = x + layer["down"](nn.functional.gelu(layer["up"](layer["norms"][1](x))))
        return x @ self.embedding.weight.T


class SyncsAlone(ProcessGroupSync):
    """A hook that makes one replica take sync steps, which it would leave out."""

    world_size = property(lambda self: 2)  # type: ignore[assignment]


def new_model(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> GPT:
    """A model that starts from the same values on every device."""
    torch.manual_seed(0)
    return GPT(*size).to(device, dtype)


# -- parity -----------------------------------------------------------------------------------------------------------


def train(device: torch.device, hook: bool, options: dict[str, Any]) -> list[Tensor]:
    """Parameters after some steps, a third of them sync steps where there is a hook; on the CPU."""
    model = new_model(PARITY_SIZE, device)
    optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(3), **options)
    if hook:
        optimizer.register_sync_hook(SyncsAlone(wire_format="int4"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(PARITY_STEPS):
        tokens = torch.randint(0, PARITY_SIZE[2], (64,), generator=generator).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % PARITY_SIZE[2]).backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    return sum(float((a - b).double().square().sum()) for a, b in zip(some, others, strict=True)) ** 0.5


def check_parity(device: torch.device) -> None:
    """Train on the device and on the CPU, and compare where the parameters end."""
    print(f"parity with the CPU: distance after {PARITY_STEPS} steps over the distance moved")
    start = [parameter.detach() for parameter in new_model(PARITY_SIZE, torch.device("cpu")).parameters()]
    for update, largest in LARGEST_DIFFERENCE.items():
        options = {"local_update": update, "local_lr": 0.1 if update == "sgd" else None}
        for hook in (False, True):
            here, expected = (train(place, hook, options) for place in (device, torch.device("cpu")))
            difference = distance(here, expected) / distance(expected, start)
            # Quantization to int4 turns small differences into steps of its own.
            largest_here = 5 * largest if hook else largest
            print(f"  {update:5}{'sync steps in int4' if hook else 'local':20}{difference:10.5f}{largest_here:10}")
            assert difference <= largest_here, "the device trains another model than the CPU"


# -- time of a step ---------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, until the device is done."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def muon_and_adamw(model: nn.Module) -> Callable[[], object]:
    """A step of torch's Muon, and of AdamW for what is no matrix of a layer."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("embedding")]
    known = set(matrices)
    both = torch.optim.Muon(matrices), torch.optim.AdamW([p for p in model.parameters() if p not in known])
    return lambda: [optimizer.step() for optimizer in both]


def local_step(model: nn.Module, **options: Any) -> Callable[[], object]:
    never = EveryNSteps(10**9)
    return CurvaDion(split_parameters(model), trigger=never, max_local_steps=None, **options).step


def sync_step(model: nn.Module) -> Callable[[], object]:
    """A sync step of one replica at the defaults: all but the network."""
    optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(1))
    optimizer.register_sync_hook(SyncsAlone())
    return optimizer.step


STEPS: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "torch AdamW": lambda model: torch.optim.AdamW(model.parameters()).step,
    "torch Muon + AdamW": muon_and_adamw,
    "CurvaDion, Muon": local_step,
    "CurvaDion, Dion 1/4": partial(local_step, rank_fraction=0.25),
    "CurvaDion, sync step": sync_step,
}


def time_steps(name: str, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rounds: int) -> None:
    """Print the median time of a step of every optimizer."""
    model = new_model(size, device, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"time of a step, {name}: {count / 1e6:.0f} M parameters in {dtype}")
    medians: dict[str, float] = {}
    for label, build in STEPS.items():
        step = build(model)
        for _ in range(2):
            step()
        medians[label] = statistics.median(seconds(step, device) for _ in range(rounds))
        # One state at a time fits beside the model.
        del step
    adamw, muon = medians["torch AdamW"], medians["torch Muon + AdamW"]
    print(f"  {'':24}{'ms':>9}{'/ AdamW':>9}{'/ Muon':>9}")
    for label, median in medians.items():
        print(f"  {label:24}{median * 1e3:9.2f}{median / adamw:9.2f}{median / muon:9.2f}")


# -- waits of the host ------------------------------------------------------------------------------------------------


def waits_in(function: Callable[[], object], device: torch.device) -> Counter[str]:
    """Waits of the host and copies to it in a call, as the profiler sees them; none on a CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    wait_for(device)
    with profile(activities=activities) as recorder:
        function()
    return Counter(
        event.name
        for event in recorder.events()
        if event.name.startswith(_COPIES) or (event.device_type.name == "CPU" and event.name in _WAITS)
    )


def places_of_waits(function: Callable[[], object], device: torch.device) -> Counter[str]:
    """The lines at which torch says that the host waits."""
    if device.type != "cuda":
        return Counter()
    wait_for(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught)


def check_waits(device: torch.device) -> None:
    """Print how often the host waits in a step, for few layers and for many."""
    print("waits of the host in a step, by the profiler, and the lines that torch names")
    # On a CPU it waits for nothing, and the profiler takes long to list what a step does.
    few, many = 2, 12 if device.type == "cuda" else 4
    for label, every, momentum in (("local", 10**9, None), ("sync", 1, None), ("sync, factors", 1, "factors")):
        seen = {}
        for layers in (few, many):
            model = new_model((layers, 64, 128), device)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(every), max_local_steps=None)
            optimizer.register_sync_hook(SyncsAlone(momentum=momentum))
            for _ in range(3):
                optimizer.step()
            seen[layers] = waits_in(optimizer.step, device), places_of_waits(optimizer.step, device)
            by_profiler, by_torch = seen[layers]
            print(f"  {label:14}{layers:3} layers  {dict(by_profiler) or 'none'}  {dict(by_torch) or ''}")
        # The profiler's own wait at its end may be among those it sees.
        assert seen[few][1] == seen[many][1], "the host waits more often for more layers"
        if label == "local":
            assert sum(seen[few][1].values()) <= 1, "the host waits more than once in a local step"
            assert sum(count for name, count in seen[few][0].items() if name.startswith(_COPIES)) <= 1


# -- overlap ----------------------------------------------------------------------------------------------------------


def record_trace(rank: int, world: int, backend: str, device_type: str, folder: str) -> None:
    """One process of a traced run."""
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device(device_type, rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    recorder = profiling.train(Path(folder), device)
    if rank == 0:
        Path(folder, "report").write_text(profiling.report(recorder))
    dist.destroy_process_group()


def show_overlap(device: torch.device) -> None:
    """Trace replicas, and print what lies beside what."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    backend, world = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "the CPU"
    print(f"overlap: {world} processes on {where} through {backend}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(record_trace, (world, backend, device.type, folder), nprocs=world)
        print(Path(folder, "report").read_text())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny models and few rounds")
    args = parser.parse_args()
    device = torch.device(args.device, torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    print(f"{torch.cuda.get_device_name(device) if args.device == 'cuda' else 'CPU'}, torch {torch.__version__}")

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        check_parity(device)
        for name, size in (SMOKE_SIZES if args.smoke else SIZES).items():
            for dtype in (torch.float32, torch.bfloat16):
                time_steps(name, size, device, dtype, rounds=2 if args.smoke else 20)
        check_waits(device)
        dist.destroy_process_group()
    show_overlap(device)


if __name__ == "__main__":
    main()
