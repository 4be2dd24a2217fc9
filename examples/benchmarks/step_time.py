"""Time of one optimizer step: CurvaDion (local and sync) beside torch's AdamW and Muon, for the matrices of a GPT.

    python examples/benchmarks/step_time.py            # 12 layers, 768 wide: 85 M parameters, minutes (Muon is slow
    on a CPU) python examples/benchmarks/step_time.py --smoke    # 2 layers, 64 wide: seconds

One process, one thread, random gradients that change at every step. The optimizers take turns in one run, so that a
change of the machine's speed meets all of them; quote the ratios of the medians.
"""

import argparse
import os
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
    """The weight matrices of a GPT: packed attention projection, its output, and the two of the MLP."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [nn.Parameter(0.02 * torch.randn(shape)) for _ in range(layers) for shape in shapes]


def rmmc(optimizer: CurvaDion) -> None:
    """The norms of M + G of all matrices: what RMMC adds to a step, and what finds gradients that are not finite."""
    for stack in optimizer.matrix_stacks():
        momentum_norms(stack.momenta, stack.gradients)


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank-fraction", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each optimizer that are timed")
    parser.add_argument("--muon-rounds", type=int, default=2, help="the same for Muon")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.layers, args.width, args.rounds = 2, 64, 3

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rendezvous = os.path.join(tempfile.mkdtemp(), "store")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)

    parameters = matrices(args.layers, args.width)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    local = CurvaDion(
        parameters, trigger=RMMCThreshold(float("inf")), max_local_steps=None, rank_fraction=args.rank_fraction
    )
    sync = CurvaDion(parameters, trigger=EveryNSteps(1), rank_fraction=args.rank_fraction)
    sync.register_sync_hook(ProcessGroupSync())
    contestants: dict[str, tuple[Callable[[], object], int]] = {
        "AdamW": (torch.optim.AdamW(parameters).step, args.rounds),
        "CurvaDion, local step": (local.step, args.rounds),
        "CurvaDion, sync step": (sync.step, args.rounds),
        "RMMC of all matrices": (lambda: rmmc(local), args.rounds),
        "Muon": (torch.optim.Muon(parameters).step, args.muon_rounds),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(args.rounds + 1):
        for name, (step, rounds) in contestants.items():
            if number > rounds:
                continue
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.normal_()
            start = time.perf_counter()
            step()
            if number > 0:  # the first round creates state
                times[name].append(time.perf_counter() - start)

    count = sum(parameter.numel() for parameter in parameters)
    median = {name: statistics.median(values) for name, values in times.items()}
    setting = f"rank fraction {args.rank_fraction}, float32, one thread, torch {torch.__version__}"
    print(f"{count / 1e6:.1f} M parameters, {setting}")
    print(f"{'':24}{'median':>10}{'min':>10}{'max':>10}{'/ AdamW':>10}{'/ Muon':>10}")
    for name, value in median.items():
        ratios = f"{value / median['AdamW']:10.2f}{value / median['Muon']:10.3f}"
        print(f"{name:24}{value:9.3f}s{min(times[name]):9.3f}s{max(times[name]):9.3f}s{ratios}")
    share = median["RMMC of all matrices"] / median["CurvaDion, local step"]
    print(f"RMMC takes {100 * share:.1f} % of a local step")
    parameter_bytes = sum(parameter.nbytes for parameter in parameters)
    print(f"state of CurvaDion: {state_size(local) / parameter_bytes:.3f} times the parameters (AdamW: 2)")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
