"""``nnUNetv2_topomae study commands``: what is missing, as a shell script or as job arrays of SLURM."""

import shlex

from nnunet_topomae.nnunet.training.checkpointing import CHECKPOINTS, FINAL
from nnunet_topomae.studies.steps import PRETRAIN, SUMMARY, Step, Steps

_CAN_GO_ON = " || ".join(f'-f "$fold/{name}"' for name in CHECKPOINTS)
_HEAD = "#!/usr/bin/env bash\nset -euo pipefail\n"
_SETUP = 'export nnUNet_extTrainer="$(nnUNetv2_topomae trainers)${nnUNet_extTrainer:+:$nnUNet_extTrainer}"\n'

_FUNCTIONS = f"""
# train FOLD WEIGHTS ARGUMENTS: what is missing of a training, also when the job is started again.
# FOLD is the folder with its checkpoints, WEIGHTS what it starts from, or "".
train() {{
    local fold="$1" weights="$2"
    shift 2
    if [[ -f "$fold/{FINAL}" && -f "$fold/{SUMMARY}" ]]; then
        echo "$fold is complete"
    elif [[ -f "$fold/{FINAL}" ]]; then
        nnUNetv2_train "$@" --val
    elif [[ {_CAN_GO_ON} ]]; then
        nnUNetv2_train "$@" --c
    elif [[ -n "$weights" ]]; then
        nnUNetv2_train "$@" -pretrained_weights "$weights"
    else
        nnUNetv2_train "$@"
    fi
}}

# predict FOLDER PARTIAL ARGUMENTS: predicts into PARTIAL, which becomes FOLDER when it is complete.
predict() {{
    local folder="$1" partial="$2"
    shift 2
    if [[ -d "$folder" ]]; then
        echo "$folder is complete"
        return
    fi
    mkdir -p "$(dirname "$folder")"
    rm -rf "$partial"
    nnUNetv2_predict "$@"
    mv "$partial" "$folder"
}}
"""


def pending(steps: Steps) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Commands that are missing, by name: pre-trainings; the rest of the runs that wait for them; all other runs."""
    pretrainings: dict[str, str] = {}
    waiting: dict[str, str] = {}
    others: dict[str, str] = {}
    for row, run in steps.study.runs():
        missing = [step for step in steps.of_run(row, run) if not step.is_done]
        needed = {step.name: command(step) for step in missing if step.stage == PRETRAIN}
        pretrainings |= needed
        if own := [command(step) for step in missing if step.stage != PRETRAIN]:
            (waiting if needed else others)[f"{row.name}_{run.labelled}_seed{run.seed}"] = "\n".join(own)
    return pretrainings, waiting, others


def command(step: Step) -> str:
    """A step as a line of shell, which calls one of the functions at the head of the script."""
    if step.partial:
        return shlex.join(["predict", str(step.folder), str(step.partial), *step.command[1:]])
    return shlex.join(["train", str(step.folder), str(step.weights or ""), *step.command[1:]])


def shell_script(steps: Steps) -> str:
    """All commands that are missing, one after another."""
    lines = [line for commands in pending(steps) for line in commands.values()]
    return "\n".join([_HEAD, _SETUP, _FUNCTIONS, *lines, _measure(steps)])


def slurm_script(steps: Steps, options: str) -> str:
    """A script to be run once, which submits job arrays: pre-trainings, the runs that wait for these, and other runs.

    Jobs that wait start when all pre-trainings have ended, and fail by themselves if theirs has failed. A job that is
    started again goes on from its last checkpoint. The last job measures.

    Args:
        steps: of the study.
        options: of sbatch, for all arrays.
    """
    pretrainings, waiting, others = pending(steps)
    parts = [_HEAD, _SETUP]
    if pretrainings:
        parts.append(_array("pretrainings", pretrainings, options))
    if waiting:
        parts.append(_array("waiting", waiting, f"--dependency=afterany:$pretrainings {options}"))
    if others:
        parts.append(_array("others", others, options))
    submitted = [name for name, commands in (("waiting", waiting), ("others", others)) if commands]
    after = f"--dependency=afterany:{':'.join(f'${name}' for name in submitted)} " if submitted else ""
    parts.append(f"sbatch {after}--job-name=measure --wrap {shlex.quote(_measure(steps))}")
    return "\n".join(parts)


def _array(name: str, commands: dict[str, str], options: str) -> str:
    """The submission of an array whose job ID is kept in the variable ``name``."""
    cases = "\n".join(f"{n}) # {what}\n{lines} ;;" for n, (what, lines) in enumerate(commands.items()))
    return (
        f"{name}=$(sbatch --parsable --job-name={name} --array=0-{len(commands) - 1} {options} <<'JOB'\n"
        f'{_HEAD}{_FUNCTIONS}case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac\nJOB\n)\n'
    )


def _measure(steps: Steps) -> str:
    return shlex.join(["nnUNetv2_topomae", "study", "measure", str(steps.study.folder)])
