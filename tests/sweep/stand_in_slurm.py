"""SLURM's commands, stood in for by small scripts."""

from __future__ import annotations

import sys
from pathlib import Path

from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.slurm_batches import Note
from domainbed_sfp.sweep.spec import read_spec

SPEC = """
datasets: [FullColoredDigits]
algorithms: [ERM, {name: Magnitude, hparams: {sparsity: 0.3}}]
test_envs: [[1], [2]]
n_hparams: 1
n_trials: 1
steps: 11
hparams: {batch_size: 16}
"""


# sbatch notes the script and puts the tasks of its array into the queue; squeue prints the queue, if it has an answer.
SBATCH = """
import re, sys
from pathlib import Path
root = Path(__file__).parent
refusal = root / "refusal"
scripts = sorted(root.glob("script*"))
if refusal.exists() and len(scripts) >= int(refusal.read_text().split("|")[0]):
    sys.exit(refusal.read_text().split("|")[1])
text = Path(sys.argv[1]).read_text()
array = 100 + len(scripts)
(root / f"script{array}").write_text(text)
name = re.search("--job-name=(.*)", text)[1]
last = int(re.search(r"--array=0-(\\d+)%", text)[1])
with open(root / "queue", "a") as queue:
    for index in range(last + 1):
        queue.write(f"{array}|{index}|{name}|PENDING|Priority\\n")
if (root / "impatient").exists():
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
print(f"Submitted batch job {array}")
"""


SQUEUE = """
import sys
from pathlib import Path
root = Path(__file__).parent
if (root / "down").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
names = next(flag.partition("=")[2] for flag in sys.argv if flag.startswith("--name=")).split(",")
queue = root / "queue"
for line in queue.read_text().splitlines() if queue.exists() else []:
    if line.split("|")[2] in names:
        print(line)
"""


SCONTROL = """
import sys
from pathlib import Path
root = Path(__file__).parent
if sys.argv[1:] == ["show", "config"]:
    print("MaxArraySize            = 3\\nMaxJobCount = 10000")
elif (root / "refusal").exists():
    sys.exit((root / "refusal").read_text())
else:
    (root / "requeued").write_text(" ".join(sys.argv[1:]))
"""


class FakeSlurm:
    """The commands on PATH, and what they know."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL), ("srun", "")):
            (root / name).write_text(f"#!{sys.executable}\n{text}")
            (root / name).chmod(0o755)

    @property
    def scripts(self) -> list[str]:
        return [path.read_text() for path in sorted(self.root.glob("script*"))]

    @property
    def queue(self) -> list[list[str]]:
        file = self.root / "queue"
        return [line.split("|") for line in file.read_text().splitlines()] if file.exists() else []

    def set_state(self, index: int, state: str, reason: str = "None", array: str | None = None) -> None:
        """Of a task, by its place in the queue's last array unless `array` is given."""
        rows = self.queue
        array = array or rows[-1][0]
        for row in rows:
            if row[:2] == [array, str(index)]:
                row[3:] = [state, reason]
        (self.root / "queue").write_text("".join("|".join(row) + "\n" for row in rows))

    def empty_queue(self) -> None:
        (self.root / "queue").write_text("")


def finish(folder: Path) -> None:
    """What a run that is done leaves."""
    (folder / "results.jsonl").write_text("{}\n")
    (folder / "done").write_text("done")


def batches(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in (tmp_path / "out" / "slurm").glob("*/tasks.json"))


def folder_of(batch: Path, index: int) -> Path:
    return Path(slurm_batches.read_tasks(batch)[index]["folder"])


def batch_of(tmp_path: Path, array: str) -> Path:
    return next(batch for batch in batches(tmp_path) if (batch / f"{array}_submission.sh").exists())


def end_all(fake: FakeSlurm, tmp_path: Path, note: Note, log: str = "") -> None:
    """All tasks leave the queue in the same manner."""
    for array, index, *_ in fake.queue:
        batch = batch_of(tmp_path, array)
        slurm_batches.write_note(batch, int(index), note)
        (batch / f"{array}_{index}_0_log.err").write_text(log)
    fake.empty_queue()


def read_spec_of(tmp_path: Path):
    return read_spec(str(tmp_path / "spec.yaml"))
