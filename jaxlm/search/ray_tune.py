"""A space and a config as Ray Tune knows them, for those who have a Ray cluster: pip install 'jaxlm[ray]'. Home of ray.

Ray decides which values are tried, where, and when a trial ends; each trial is a run in a process of its own, FOLDER/trials/ID, that jaxlm's own checkpoints
carry over whatever Ray does with it: a trial that is paused, moved or killed goes on from its newest one. docs/search.md has a whole script.
"""

import pathlib
import subprocess
import sys
import time
from typing import Any

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.search import space as spaces
from jaxlm.search import study as studies
from jaxlm.search.space import Space

GRACE = 120.0  # seconds that a trial has to save when Ray ends it


def param_space(space: Space, grid: bool = False) -> dict[str, Any]:
    """`tune.Tuner`'s param_space.

    Args:
      grid: every combination of the points of each key, in place of draws.

    Raises:
      ValueError: one line: a grid of a range without a number of points, no ray.
    """
    tune = _tune()
    if grid:
        return {key: tune.grid_search(given.points(key)) for key, given in space.items()}
    draw = {(False, False): tune.uniform, (True, False): tune.loguniform, (False, True): tune.randint, (True, True): tune.lograndint}
    return {key: tune.choice(list(given.values)) if isinstance(given, spaces.Choice) else draw[given.log, given.whole](
        int(given.low) if given.whole else given.low, int(given.high) + 1 if given.whole else given.high) for key, given in space.items()}


def trainable(config: Config, space: Space, folder: pathlib.Path) -> type:
    """`tune.Tuner`'s trainable. Prepares the corpus that all trials share, if they do, here and now.

    Each evaluation is a result: `checkpoint.metric` on the validation split under its own name, `step`, and the trial's `workdir`; a last one, with done=True,
    has the figure of the whole run (its best evaluation where the run ends with its best checkpoint). No trial looks at the test split.

    Args:
      folder: on a file system that all nodes of the cluster see.

    Raises:
      ValueError, OSError: one line: what keeps all trials from running.
    """
    tune, folder = _tune(), folder.absolute()
    from jaxlm.search import trials
    from jaxlm.train import best

    best.check(config)
    folder.mkdir(parents=True, exist_ok=True)
    trials.prepare(config, space, folder, lambda line: print(line, flush=True))

    class Trial(tune.Trainable):
        """A run in a process of its own; Ray's iterations are its evaluations."""

        def setup(self, values: dict[str, Any]) -> None:
            self._workdir = folder / "trials" / self.trial_id
            self._config = studies.trial_config(config, space, folder, values)
            self._workdir.mkdir(parents=True, exist_ok=True)
            (self._workdir / "config.py").write_text(configs.to_recipe(self._config, f"Trial {self.trial_id} of {folder}"), encoding="utf-8")
            with open(self._workdir / "log.txt", "a") as log:
                self._process = subprocess.Popen([sys.executable, "-m", "jaxlm", "train", f"--config={self._workdir / 'config.py'}", f"--workdir={self._workdir}",
                                                  "--trial"], stdout=log, stderr=log)

        def step(self) -> dict[str, Any]:
            metric = config.checkpoint.metric
            while True:
                code = self._process.poll()  # first: what was logged before the end is read below
                found = list(best.figures(self._config, self._workdir).items())
                if len(found) > self.iteration:
                    step, figure = found[self.iteration]
                    return {metric: figure, "step": step, "workdir": str(self._workdir)}
                if code == 0 and found:
                    return {metric: trials.result(self._config, self._workdir), "step": found[-1][0], "workdir": str(self._workdir), "done": True}
                if code is not None:
                    lines = (self._workdir / "log.txt").read_text(errors="replace").split("\n")
                    raise RuntimeError(f"{self._workdir} ended with code {code}: {next((line for line in reversed(lines) if line.strip()), '')}")
                time.sleep(0.1)

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: the workdir has its own."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing: the run goes on from its workdir's."""

        def cleanup(self) -> None:
            self._process.terminate()  # saves, a step later
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()

    return Trial


def _tune() -> Any:
    try:
        from ray import tune
    except ImportError:
        raise ValueError("Ray Tune is not installed: pip install 'jaxlm[ray]'") from None
    return tune
