"""Run main.py as a job on a Slurm cluster; a requeued job continues from its last checkpoint.

python run_with_submitit.py --nodes 4 --ngpus 8 --timeout 2800 --partition gpu --coco_path /data/coco
python run_with_submitit.py --executor local --ngpus 2 --device cpu --coco_path /data/coco   # without a cluster

Every flag of main.py is accepted too. The run's files and Slurm's logs go to `--job_dir`, on a disk that all nodes see.
"""

import argparse
import os
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import main as detr
from util import recipes
from util.cli import command_line, exit_status
from util.flags import check_numbers

AT_LEAST = {"ngpus": 1, "nodes": 1, "timeout": 1, "mem_gb": 1, "cpus_per_task": 1, "signal_delay": 0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags of the job, and main.py's."""
    parser = command_line(__doc__, detr.get_args_parser())
    add = parser.add_argument_group("job").add_argument
    add("--ngpus", default=8, type=int, help="processes on each node, each with a GPU unless --device is cpu")
    add("--nodes", default=4, type=int, help="nodes")
    add("--timeout", default=60, type=int, help="minutes; a run that needs more is requeued")
    add("--job_dir", default="./jobs/%j", help="folder of the job; %%j stands for its number")
    add("--executor", default="slurm", choices=("slurm", "local", "debug"),
        help="local: processes on this machine; debug: in this process")  # fmt: skip
    add("--job_name", default="detr", help="name in the queue")
    add("--partition", help="Slurm partition")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--constraint", help="features the nodes must have, such as a kind of GPU")
    add("--comment", help="comment for the scheduler")
    add("--mem_gb", default=None, type=int, help="memory of a node; default: 40 for each process")
    add("--cpus_per_task", default=10, type=int, help="CPUs of each process")
    add("--signal_delay", default=120, type=int, help="seconds before the time limit at which Slurm warns the job")
    return recipes.parse_args(parser, argv)


def get_shared_folder() -> Path:
    """Return the folder for files that all nodes must see: `jobs` in the working directory."""
    folder = Path("jobs").absolute()
    folder.mkdir(exist_ok=True)
    return folder


def get_init_file() -> Path:
    """Return a new name in the shared folder, for `--dist_url file://...`."""
    return get_shared_folder() / f"{uuid.uuid4().hex}_init"


class Trainer:
    """One process of a job, as submitit pickles and calls it."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def __call__(self) -> None:
        """Train, or continue where an earlier attempt of the same job stopped."""
        self._setup_gpu_args()
        detr.main(self.args)

    def checkpoint(self):
        """Return the job that submitit requeues; the run was saved before this is called."""
        import submitit

        return submitit.helpers.DelayedSubmission(type(self)(self.args))

    def _setup_gpu_args(self) -> None:
        """Set the output folder, what to resume, and the environment variables by which the job's processes connect."""
        import submitit

        job_id = str(submitit.JobEnvironment().job_id)
        self.args.output_dir = self.args.job_dir.replace("%j", job_id)
        remove_template(self.args.job_dir)
        if any(Path(self.args.output_dir).glob("checkpoint*.pth")):
            self.args.resume = "auto"
        # The address follows from the job: a requeued one finds no file of an earlier attempt.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def main(args: argparse.Namespace | None = None) -> None:
    """Submit the job and print where its logs are. `args` defaults to the command line's.

    Raises ValueError for flags that cannot be used.
    """
    import submitit

    args = args or parse_args()
    check_numbers(vars(args), AT_LEAST)
    detr.check_flags(args)
    if args.output_dir:
        raise ValueError(f"--output_dir {args.output_dir}: a job's output goes to --job_dir")
    args.job_dir = str(Path(args.job_dir).absolute())
    project = str(Path(__file__).parent.absolute())  # the job's interpreter must find main.py from any folder
    os.environ["PYTHONPATH"] = os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])])
    executor = submitit.AutoExecutor(folder=args.job_dir, cluster=args.executor, slurm_max_num_timeout=100)
    executor.update_parameters(
        name=args.job_name,
        nodes=args.nodes if args.executor == "slurm" else 1,
        tasks_per_node=args.ngpus,
        gpus_per_node=args.ngpus if args.device.startswith("cuda") else None,
        cpus_per_task=args.cpus_per_task,
        mem_gb=args.mem_gb or 40 * args.ngpus,
        timeout_min=args.timeout,
    )
    options = {name: getattr(args, name) for name in ("partition", "account", "qos", "constraint", "comment")}
    executor.update_parameters(
        slurm_signal_delay_s=args.signal_delay,
        slurm_srun_args=["--kill-on-bad-exit=1"],
        **{f"slurm_{name}": value for name, value in options.items() if value},
    )
    job = executor.submit(Trainer(args))
    print(f"job {job.job_id}: logs {job.paths.stdout} and {job.paths.stderr}")
    print(f"checkpoints, log.txt and curves: {args.job_dir.replace('%j', str(job.job_id))}")
    if args.executor == "local":
        follow(job)
    if args.executor != "slurm":
        job.results()
    remove_template(args.job_dir)


def remove_template(job_dir: str) -> None:
    """Remove the folder whose name has `%j` itself in it, which submitit makes, if it is empty."""
    if "%j" in job_dir:
        with suppress(OSError):
            Path(job_dir).rmdir()


def follow(job) -> None:
    """Print what the first process of a job prints, until the job ends."""
    printed, ended = 0, False
    while not ended:
        ended = job.done()
        if job.paths.stdout.is_file():
            with open(job.paths.stdout, errors="replace") as log:
                log.seek(printed)
                print(log.read(), end="", flush=True)
                printed = log.tell()
        time.sleep(0 if ended else 1)


if __name__ == "__main__":
    sys.exit(exit_status(main))
