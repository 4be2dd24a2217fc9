"""Time of one optimizer step on the matrices of a GPT: CurvaDion's local steps beside torch's AdamW and Muon.

    python examples/benchmarks/step_time.py            # 12 layers, 768 wide: 85 M parameters, minutes
    python examples/benchmarks/step_time.py --smoke    # 2 layers, 64 wide: seconds

One process, one thread, new random gradients at every step, parameters in float32 and then in bfloat16. The optimizers
take turns, so that a change of the machine's speed affects all of them. Quote the ratios of the medians, and the
processor: Muon computes in bfloat16 whatever the parameters, and some processors are slow at that.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_curvadion import CurvaDion, RMMCThreshold
from lightning_curvadion.optim.rmmc import momentum_norms

RANK_FRACTIONS = (0.25, 0.5, 1.0)


def processor() -> str:
    """The processor's name, and which of its instructions for bfloat16 it has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    instructions = {"amx_bf16", "avx512_bf16"} & set(fields.get("flags", "").split())
    return f"{fields.get('model name', 'unknown processor')} ({', '.join(sorted(instructions)) or 'no bfloat16'})"


def matrices(layers: int, width: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Weight matrices of a GPT with random gradients: packed attention projection, its output, the MLP's two."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    parameters = [nn.Parameter(0.02 * torch.randn(shape, dtype=dtype)) for _ in range(layers) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def compute_norms(optimizer: CurvaDion) -> None:
    """The norms of M + G of all matrices: what RMMC and the gradient check add to a step."""
    for stack in optimizer.matrix_stacks():
        momentum_norms(stack.momenta, stack.gradients)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def time_in_turns(
    functions: dict[str, tuple[Callable[[], object], int]], parameters: list[nn.Parameter]
) -> dict[str, list[float]]:
    """Seconds of every call, by function. Each function comes with its number of rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(max(rounds for _, rounds in functions.values()) + 1):
        for name, (function, rounds) in functions.items():
            if number > rounds:
                continue
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.normal_()
            start = time.perf_counter()
            function()
            if number > 0:  # the first round creates state
                times[name].append(time.perf_counter() - start)
    return times


def print_table(times: dict[str, list[float]]) -> None:
    """Print medians, extremes and ratios."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{'':36}{'median':>10}{'min':>10}{'max':>10}{'/ AdamW':>10}{'/ Muon':>10}")
    for name, median in medians.items():
        ratios = f"{median / medians['AdamW']:10.2f}{median / medians['Muon']:10.3f}"
        print(f"{name:36}{median:9.3f}s{min(times[name]):9.3f}s{max(times[name]):9.3f}s{ratios}")


def measure(layers: int, width: int, dtype: torch.dtype, rounds: int, muon_rounds: int) -> None:
    """Time the steps and print them."""
    parameters = matrices(layers, width, dtype)
    never = RMMCThreshold(float("inf"))
    ours = {
        "Muon": CurvaDion(parameters, trigger=never, max_local_steps=None),
        **{
            f"Dion, rank fraction {fraction}": CurvaDion(
                parameters, trigger=never, max_local_steps=None, rank_fraction=fraction
            )
            for fraction in RANK_FRACTIONS
        },
    }
    times = time_in_turns(
        {
            "AdamW": (torch.optim.AdamW(parameters).step, rounds),
            **{f"local step, {name}": (optimizer.step, rounds) for name, optimizer in ours.items()},
            "RMMC of all matrices": (partial(compute_norms, ours["Muon"]), rounds),
            "Muon": (torch.optim.Muon(parameters).step, muon_rounds),
        },
        parameters,
    )
    count = sum(parameter.numel() for parameter in parameters)
    print(f"\n{count / 1e6:.1f} M parameters in {dtype}, one thread of {processor()}, torch {torch.__version__}")
    print_table(times)
    parameter_bytes = sum(parameter.nbytes for parameter in parameters)
    states = [f"{state_bytes(optimizer) / parameter_bytes:.2f} ({name})" for name, optimizer in ours.items()]
    print(f"state over parameters: {', '.join(states)}, 2 (AdamW)")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each optimizer")
    parser.add_argument("--muon-rounds", type=int, default=2, help="timed steps of Muon, which is slow on a CPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few rounds")
    args = parser.parse_args()
    if args.smoke:
        args.layers, args.width, args.rounds = 2, 64, 3

    torch.set_num_threads(1)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        measure(args.layers, args.width, dtype, args.rounds, args.muon_rounds)


if __name__ == "__main__":
    main()
