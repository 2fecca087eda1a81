"""From a command line to a trained model: check, prepare, build, run, report."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from march.config import ConfigError
from march.console import quiet_pipe
from march.data.errors import DataError
from march.recipe import Recipe
from march.training import arguments as command_line
from march.training.errors import RunError, UsageError

RUNS = Path("runs")


def main(argv: list[str] | None = None) -> int:
    """Run train.py with `argv` (default: the process's); returns the exit code.

    0: all steps done. 1: the run had to stop. 2: it could not start as asked. 128 + n: stopped by signal n, with a
    checkpoint.
    """
    return quiet_pipe(_main, argv)


def _main(argv: list[str] | None) -> int:
    # OpenMP's threads spin while they wait, before torch is loaded is the time to say otherwise: with other programs
    # on the cores a demo step took 13 s spinning and 2.6 s asleep (2 cores, load 7)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        given = command_line.build_parser().parse_args(argv)
        command_line.check_mode(given)
        if given.list or given.show:
            from march.report import listing

            return listing.main(given)
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints about memory; nobody asked for it there
            return _train(given)
    except BrokenPipeError:  # quiet_pipe's
        raise
    except (UsageError, ConfigError, DataError, RunError, OSError) as error:
        report = getattr(error, "report", None)
        # a mistake on the command line is every rank's; one of them says it
        if report or (report is None and os.environ.get("RANK", "0") == "0"):
            with contextlib.suppress(OSError):  # the terminal has gone
                print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 1 if isinstance(error, RunError | OSError) else 2
        if os.environ.get("WORLD_SIZE", "1") != "1" and "torch" in sys.modules:
            # the process group is left standing: its threads abort an orderly exit now and then, with another code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


def _train(given) -> int:
    import torch

    if given.resume is not None and given.run_dir is not None:
        raise UsageError("expected --resume or --run-dir, got both; --resume DIR names the folder")
    if given.replay is not None and (given.resume is None or given.replay < 1):
        raise UsageError("expected --replay with the number of a step and --resume, got one of them; give both")
    if given.accept_changed_file and given.resume is None:
        raise UsageError("expected --accept-changed-file with --resume, got it alone; leave it out")
    cuda = torch.cuda.is_available()
    recipe = command_line.check(given, cuda=cuda)

    from march.training import distributed, session
    from march.training.watch import Watch

    world = _join()
    folder, checkpoint = None, None
    with ExitStack() as stack:
        stop = stack.enter_context(Watch(world))
        try:
            if given.resume is not None:
                where = None if given.resume is command_line.NEWEST else given.resume
                folder, checkpoint = session.find_run(
                    where, _canonical(given.exp), given.recipe, RUNS, given.replay, world
                )
                stack.callback(folder.unlock)
                run = checkpoint.state["run"]["recipe"]
                run = run | {"experiment": session.kept_file(folder, run["experiment"])}
                recipe = command_line.check(given, cuda=cuda, run=run)
            if recipe.precision.compute == "fastest":
                recipe = recipe.computing(session.fastest_precision(world))
            code = _run(recipe, given, folder, checkpoint, world, stop, stack)
            # not in a finally: a rank that failed leaves at once, and the launcher ends the others
            distributed.stop(world)
        except Exception as error:
            lost = stop.lost(error)
            if lost is None:
                raise
            raise lost from error
    return code


def _join():
    from march.training import distributed

    try:
        return distributed.start()
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, UsageError | RunError):
            raise
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        got = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"expected to join {os.environ.get('WORLD_SIZE', '?')} process(es) at {place}, got {got}; use a free port "
            "(deepspeed --master_port), or unset RANK, WORLD_SIZE and MASTER_PORT for one process"
        ) from error


def _canonical(name: str | None) -> str | None:
    from march import experiments

    return experiments.get(name).name if name else None


def _run(recipe: Recipe, given, folder, checkpoint, world, stop, stack: ExitStack) -> int:
    import kernels
    from march.data import SpanCorruption
    from march.training import records, session
    from march.training.distributed import log_rank0, run_on_rank
    from march.training.loop import Plan, Trainer
    from march.training.replay import replay
    from march.training.runfolder import peak_memory, process_age, refuse_other_fingerprint

    changes = recipe.changes()
    log_rank0(
        world, f"{recipe.entry.name} | recipe {recipe.name}: {recipe.label}{f'; with {changes}' if changes else ''}"
    )
    session.require_memory(recipe, world)
    session.check_kernels(recipe, world)
    store = session.prepare_data(recipe, world)
    config = session.fit_vocabulary(recipe, store)
    corruption = SpanCorruption(sequence_length=recipe.batch.sequence_length)
    session.check_lengths(config, corruption)
    seeds = {"train": recipe.seed, "validation": session.EVALUATION_SEED, "test": session.EVALUATION_SEED}
    train, validation, test = (session.examples(store, name, corruption, seed) for name, seed in seeds.items())
    data = {name: entry["sha256"] for name, entry in store.manifest["files"].items()}
    fingerprint = recipe.resume_fingerprint(config, data)
    state = checkpoint.state if checkpoint else {}
    before = state.get("run", {})
    session.refuse_other_file(recipe, before, given.accept_changed_file, world)
    if checkpoint:
        refuse_other_fingerprint(state["fingerprint"], fingerprint)
        if checkpoint.step >= recipe.schedule.steps and given.replay is None:
            raise UsageError(
                f"expected steps left to do, got a run of {checkpoint.step} finished ones; "
                f"ask for more with --steps {checkpoint.step + recipe.schedule.steps}"
            )
        log_rank0(world, f"continuing {folder.path} after step {checkpoint.step}")

    numerics = session.fix_numerics(before.get("numerics"), recipe.precision.float32_library, world)
    model = session.build_model(recipe, config)
    same_split = state.get("micro_batch") if state.get("world_size") == world.size else None
    micro_batch = session.fit_micro_batch(recipe, config, model, corruption, world, same_split)
    if folder is None:
        folder = session.create_folder(given.run_dir, recipe, RUNS, world)
        stack.callback(folder.unlock)
    stop.advice = session.resume_command(folder, world)
    plan = Plan(
        recipe=recipe,
        micro_batch=micro_batch,
        train=train,
        validation=validation,
        fingerprint=fingerprint,
        run=records.describe(recipe, config, numerics, before),
        peak_share=session.peak_share(config, corruption, config.precision, world),
    )
    if given.replay is not None:
        trainer = Trainer(plan, model, world, None, checkpoint, stop=stop)
        log_rank0(world, replay(trainer, given.replay))
        return 0
    trainer = Trainer(plan, model, world, folder, checkpoint, stop=stop)
    run_on_rank(
        world,
        lambda: records.write_start(folder, recipe, plan, model, trainer, store, world),
        when=world.is_first,
    )
    entropy = train.label_unigram_entropy(session.ENTROPY_SEQUENCES)
    log_rank0(
        world,
        f"{folder.path} | {records.count_parameters(model):,} parameters | {world.size} process(es) x micro-batch "
        f"{micro_batch} x {trainer.accumulation} = {recipe.batch.sequences} sequences a step | "
        f"ln V {math.log(config.vocab_size):.2f}, unigram entropy {entropy:.2f} | "
        f"{kernels.describe(command_line.implementation(recipe), world.device)}",
    )
    try:
        outcome = trainer.run()
        # once, of a run that was finished: who chooses by a split has no other to judge the choice by
        test_loss = trainer.evaluate(test, whole=True) if outcome.stopped_by is None else None
    except RunError as error:
        failed = {"finished": False, "failed": str(error), "steps": trainer.step, **getattr(error, "facts", {})}
        records.write_end(trainer, config, entropy, failed)
        raise
    memory = records.largest_memory(peak_memory(world), world)
    end: dict[str, Any] = {
        **asdict(outcome),
        "test_loss": test_loss,
        **memory,
        "finished": outcome.stopped_by is None,
        "process_seconds": round(process_age(), 1),
        "parameters": records.count_parameters(model),
    }
    run_on_rank(world, lambda: records.write_end(trainer, config, entropy, end))
    log_rank0(world, records.closing_lines(recipe, config, folder, end, entropy))
    return outcome.exit_code
