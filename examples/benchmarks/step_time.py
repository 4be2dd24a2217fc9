"""Time of one optimizer step: CurvaDion (local and sync) beside torch's AdamW and Muon, on the matrices of a GPT.

    python examples/benchmarks/step_time.py            # 12 layers, 768 wide: 85 M parameters, minutes
    python examples/benchmarks/step_time.py --smoke    # 2 layers, 64 wide: seconds

One process, one thread, new random gradients at every step. The optimizers take turns, so that a change of the
machine's speed affects all of them. Quote the ratios of the medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, RMMCThreshold
from lightning_curvadion.optim.rmmc import momentum_norms


def matrices(layers: int, width: int) -> list[nn.Parameter]:
    """Weight matrices of a GPT with random gradients: packed attention projection, its output, the MLP's two."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    parameters = [nn.Parameter(0.02 * torch.randn(shape)) for _ in range(layers) for shape in shapes]
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
    print(f"{'':24}{'median':>10}{'min':>10}{'max':>10}{'/ AdamW':>10}{'/ Muon':>10}")
    for name, median in medians.items():
        ratios = f"{median / medians['AdamW']:10.2f}{median / medians['Muon']:10.3f}"
        print(f"{name:24}{median:9.3f}s{min(times[name]):9.3f}s{max(times[name]):9.3f}s{ratios}")
    share = medians["RMMC of all matrices"] / medians["CurvaDion, local step"]
    print(f"RMMC takes {100 * share:.1f} % of a local step")


def measure(layers: int, width: int, rank_fraction: float, rounds: int, muon_rounds: int) -> None:
    """Time the steps and print them."""
    parameters = matrices(layers, width)
    never = RMMCThreshold(float("inf"))
    local = CurvaDion(parameters, trigger=never, max_local_steps=None, rank_fraction=rank_fraction)
    sync = CurvaDion(parameters, trigger=EveryNSteps(1), rank_fraction=rank_fraction)
    sync.register_sync_hook(ProcessGroupSync())
    times = time_in_turns(
        {
            "AdamW": (torch.optim.AdamW(parameters).step, rounds),
            "CurvaDion, local step": (local.step, rounds),
            "CurvaDion, sync step": (sync.step, rounds),
            "RMMC of all matrices": (lambda: compute_norms(local), rounds),
            "Muon": (torch.optim.Muon(parameters).step, muon_rounds),
        },
        parameters,
    )
    count = sum(parameter.numel() for parameter in parameters)
    setting = f"rank fraction {rank_fraction}, float32, one thread, torch {torch.__version__}"
    print(f"{count / 1e6:.1f} M parameters, {setting}")
    print_table(times)
    parameter_bytes = sum(parameter.nbytes for parameter in parameters)
    print(f"state of CurvaDion: {state_bytes(local) / parameter_bytes:.3f} times the parameters (AdamW: 2)")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank-fraction", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each optimizer")
    parser.add_argument("--muon-rounds", type=int, default=2, help="timed steps of Muon, which is slow on a CPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few rounds")
    args = parser.parse_args()
    if args.smoke:
        args.layers, args.width, args.rounds = 2, 64, 3

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            measure(args.layers, args.width, args.rank_fraction, args.rounds, args.muon_rounds)
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
