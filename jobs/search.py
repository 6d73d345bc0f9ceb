"""Resumable runs: the one place that wires a model to the search, stage by stage."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._base.files import check_place
from .._base.progress import Reporter
from ..models.kv_cache import KV_BITS, price_kv
from ..models.samples import Samples, evaluation_samples
from ..models.wording import words_of
from ..models.workload import LoadedModel
from ..search.blackbox.storage import shown
from ..search.blackbox.study import OBJECTIVES, job_of, open_study, publish, read_job, work
from ..search.confidence import CONFIDENCE_FILE, Confidence, bootstrap
from ..search.frontier import Frontier
from ..search.kv import KVTable, split_choice, uniform_choices
from ..search.limits import build_problem
from ..search.plan import PLAN_FILE, BudgetRef, KVCache, Plan, Refinement
from ..search.problem import Problem, Solution
from ..search.quality import Tried, smallest_within
from ..search.refine import Refined, Step, refine
from ..search.solve import plan_from_choice, warn_of_spare_bytes
from ..search.solvers import SOLVERS
from ..sensitivity.shrinkage import Shrinkage
from ..sensitivity.table import SensitivityTable
from .goal import Goal
from .held_out import HeldOut
from .prepare import check, prepare, profile_stage
from .record import REPORT_FILES, Job
from .settings import REFINE_ABOVE, REFINE_STEPS, ProfileSettings, SearchSettings, read_settings
from .truth import Truth, guarded

FRONTIER_FILE = "frontier.json"
KV_FILE = "kv-{key}.json"
STUDY_FILE = "job.sqlite"
EXACT = ("certified", "dp", "highs", "ilp")  # solvers whose plans prices alone decide
KV_SAMPLES = 8  # sequences the KV cache is priced on: 3 passes per layer


def run_profile(settings: ProfileSettings, run: Path, reporter: Reporter) -> SensitivityTable:
    """Profile a model into a run folder, or take the finished profile that is there.

    Raises:
        ValueError: If a name is unknown, another process works in the folder, or it holds a
            profile made with other settings.
    """
    check(settings)
    argv = ["bitplan", "profile", settings.model]
    with _job(run, argv, {"profile": asdict(settings)}, reporter) as job, job.stage("profile"):
        return profile_stage(prepare(settings, reporter, run), run, reporter)


def run_search(
    settings: ProfileSettings, search: SearchSettings, run: Path, reporter: Reporter
) -> Plan:
    """The main job: profile, solve, refine, validate against every uniform plan, save.

    Whatever can be checked without the slow profile is checked before it.  Every stage keeps what
    it found in the run folder: a run that was stopped at any point goes on from there.

    Returns:
        The plan that measured best among the solver's, the refined one and every uniform plan
        that fits the same bytes; the others are its baselines.

    Raises:
        ValueError: On bad input; nothing is left half-written.
    """
    argv = shlex.split(search.command) if search.command else ["bitplan", "search", settings.model]
    recorded = {"profile": asdict(settings), "search": asdict(replace(search, command=None))}
    limits = search.limits()
    check(settings, search)
    with _job(run, argv, recorded, reporter) as job:
        loaded = prepare(settings, reporter, run)
        goal = Goal(search, limits, loaded)
        goal.resolve(goal.problem(loaded.blank_table()))  # what cannot fit is found out here
        samples = _evaluation(loaded.model, settings, search)
        kept = None
        if search.refine or goal.measures:  # is there enough text to keep some of it apart?
            kept = guarded(loaded.model, settings, loaded.samples, search.guard)
        with job.stage("profile"):
            table = limits.for_runtime(profile_stage(loaded, run, reporter))
        held_out = HeldOut(loaded.model, loaded.renderer, samples, run, reporter)
        return _Search(settings, goal, table, held_out, kept, run, job, reporter).finish()


def run_worker(storage: str, study: str | None, device: str, reporter: Reporter) -> int:
    """Work on the trials of a search that was started elsewhere, until they are complete.

    Args:
        storage: Optuna storage URL.
        study: Name of the study; None if there is only one.
        device: ``cpu``, ``cuda`` or ``auto``; the worker's own.
        reporter: Where progress is shown.

    Returns:
        Trials this process completed.

    Raises:
        ValueError: If there is no such study, or the model here is another one.
    """
    job = read_job(storage, study)
    settings, search = read_settings(job)
    settings = replace(settings, device=device)
    loaded = prepare(settings, reporter)
    here, there = loaded.provenance["model"]["sha256"], job["model"]["sha256"]
    if here != there:
        raise ValueError(
            f"The weights of {settings.model} here (sha256 {here[:12]}) are not those of the "
            f"search ({there[:12]}). Give every worker the same model."
        )
    inside, apart = guarded(loaded.model, settings, loaded.samples, search.guard)
    if apart.sha256 != job["guard_sha256"]:
        raise ValueError(
            f"The calibration text {settings.calibration!r} here is not that of the search. Give "
            "every worker the same file; the built-in prose differs between versions of Python."
        )
    table = search.limits().for_runtime(loaded.blank_table())
    loaded.renderer.complete(loaded.formats, reporter)
    with TemporaryDirectory() as folder:
        truth = Truth(
            loaded.model,
            loaded.renderer,
            table,
            inside,
            apart,
            Path(folder),
            settings.seed,
            reporter,
        )
        return work(storage, job["study"], truth.oracle(search.search_tokens))


@contextmanager
def _job(
    run: Path, argv: list[str], settings: Mapping[str, Any], reporter: Reporter
) -> Iterator[Job]:
    check_place(run, "--out", inside=True)
    with Job(run, argv, settings) as job:
        reporter.listener = job
        try:
            yield job
        finally:
            reporter.listener = None


class _Search:
    """The stages after the profile."""

    def __init__(
        self,
        settings: ProfileSettings,
        goal: Goal,
        table: SensitivityTable,
        held_out: HeldOut,
        kept: tuple[Samples, Samples] | None,
        run: Path,
        job: Job,
        reporter: Reporter,
    ) -> None:
        self.settings, self.search, self.goal = settings, goal.search, goal
        self.table = table
        self.held_out, self.run, self.job, self.reporter = held_out, run, job, reporter
        self.units = len(self.table.units)
        self.words = words_of(self.table.provenance["calibration"])
        self._kept = kept
        self._truth: Truth | None = None

    def finish(self) -> Plan:
        """Run every stage that is left and save the plan."""
        if self.goal.kv is not None:
            with self.job.stage("kv cache"):
                self.goal.kv = self._kv_prices()
        problem = self.goal.problem(self.table)
        self.budget = self.goal.resolve(problem)
        with self.job.stage("solve"):
            problem, solution = self._solve(problem)
        plans = {f"{self.search.solver} plan": self._plan(problem, solution)}
        refined = None
        if steps := self._steps(solution):
            with self.job.stage("refine"):
                refined = self._refine(problem, solution, steps)
            plans |= self._refined_plans(problem, solution, refined)
        with self.job.stage("validate"):
            plans |= self._uniform_plans(problem, solution, plans)
            plan = self.held_out.best(plans, self._largest_kl(plans), self.goal.size_of)
        for stale in REPORT_FILES:  # of an earlier plan in this folder
            (self.run / stale).unlink(missing_ok=True)
        weights = build_problem(self.table, self.goal.limits)
        Frontier.from_problem(weights, plan.model).save(self.run / FRONTIER_FILE)
        plan.save(self.run / PLAN_FILE)
        with self.job.stage("confidence"):
            self._confidence(problem, plan, solution, refined)
        return plan

    def _kv_prices(self) -> KVTable:
        samples = self.goal.work.samples.first(KV_SAMPLES)
        model = self.table.provenance["model"]["sha256"]
        digest = hashlib.sha256(f"{model} {samples.sha256} {samples.count}".encode()).hexdigest()
        path = self.run / KV_FILE.format(key=digest[:12])
        if path.exists():
            self.reporter.say(f"KV cache prices found in {path}, not measured again")
            return KVTable.load(path)
        layers = len(self.goal.kv.layers) if self.goal.kv else 0
        passes = len(samples.batches) * (1 + layers * (len(KV_BITS) - 1))
        with self.reporter.bar("Pricing the KV cache", passes) as advance:
            found = price_kv(self.goal.work.model, samples, KV_BITS, lambda: advance(1))
        table = KVTable(found.layers, found.bits, found.bytes_per_token, found.kl, found.stderr)
        table.save(path)
        return table

    def _solve(self, problem: Problem) -> tuple[Problem, Solution]:
        """Solve for the bytes or the quality; the problem gets the oracle that solvers may ask."""
        search, seed = self.search, self.settings.seed
        if search.budget is None and search.vram is None:
            return problem, self._smallest(problem)
        if self.goal.measures:
            return self._solve_on_model(problem)
        solution = SOLVERS.get(search.solver)(problem, self.budget.bytes, seed=seed)
        if not problem.constraints:
            warn_of_spare_bytes(problem, self.budget.bytes)
        return problem, solution

    def _solve_on_model(self, problem: Problem) -> tuple[Problem, Solution]:
        search, seed = self.search, self.settings.seed
        storage = search.storage or f"sqlite:///{self.run / STUDY_FILE}"
        study = search.study or f"{self.run.name}-{search.solver}-{self.budget.bytes}-{seed}"
        title = f"Searching on measured KL ({search.solver})"
        with self.reporter.bar(title, search.search_tokens) as advance:
            oracle = self.truth.oracle(search.search_tokens, storage, study, advance)
            problem = replace(problem, oracle=oracle)
            if search.solver in OBJECTIVES:
                self._publish(problem, storage, study)
            solution = SOLVERS.get(search.solver)(problem, self.budget.bytes, seed=seed)
        return replace(problem, oracle=None), solution

    def _publish(self, problem: Problem, storage: str, study: str) -> None:
        job = job_of(problem, self.budget.bytes, self.search.solver, self.settings.seed)
        search = replace(self.search, storage=None)  # its URL may hold a password
        recorded = {"profile": asdict(self.settings), "search": asdict(search)}
        model = self.table.provenance["model"]
        origin = {"model": model, "guard_sha256": self.truth.guard.sha256}
        publish(open_study(storage, study, self.search.solver), job | recorded | origin)
        self.reporter.say(
            f"Share the work: bitplan worker --storage '{shown(storage)}' --study {study}"
        )

    def _smallest(self, problem: Problem) -> Solution:
        """The smallest plan that measures within the target on held-out text."""

        def measured(choice: NDArray[np.intp]) -> float:
            plan = self._plan(problem, problem.evaluate(choice, np.inf))
            result = self.held_out.measure({f"{plan.bpw:.2f} bpw": plan})[f"{plan.bpw:.2f} bpw"]
            if self.search.max_kl is not None:
                return result.mean_kl
            if result.perplexity is None or self.held_out.ppl_original is None:
                raise ValueError("--max-ppl needs a language model. Use --max-kl.")
            return float(np.log(result.perplexity / self.held_out.ppl_original))

        target, what = self.search.max_kl, "KL"
        if target is None:
            assert self.search.max_ppl is not None
            whole = self._plan(problem, problem.evaluate(problem.best_choice(), np.inf))
            self.held_out.measure({"the largest plan": whole})
            original = self.held_out.ppl_original
            if original is None or self.search.max_ppl <= original:
                raise ValueError(
                    f"--max-ppl {self.search.max_ppl:g} is not above the original's perplexity"
                    + (f" of {original:.4g}." if original else ": it has none. Use --max-kl.")
                )
            target, what = float(np.log(self.search.max_ppl / original)), "log perplexity increase"
        sized, amount = self.goal.sized(problem, self.table)

        def report(tried: Tried) -> None:
            self.reporter.say(
                f"{amount(tried.bytes)}: predicted {tried.predicted:.4g}, "
                f"measured {tried.measured:.4g}"
            )

        found = smallest_within(
            sized,
            target,
            measured,
            what=what,
            solver=self.search.solver,
            seed=self.settings.seed,
            report=report,
            amount=amount,
        )
        solution = replace(problem.evaluate(found.choice, found.lower_bound), note=found.note)
        if not self.search.fastest:  # which may take any number of bytes
            self.budget = BudgetRef(text=self.goal.target, bytes=solution.bytes)
        return solution

    def _largest_kl(self, plans: Mapping[str, Plan]) -> float | None:
        """The measured KL a plan may have if the goal is a quality; None for the least there is.

        For a perplexity it is that of the plan that was found to reach it.
        """
        if self.search.max_kl is not None or self.search.max_ppl is None:
            return self.search.max_kl
        found = next(iter(plans))
        return self.held_out.measure({found: plans[found]})[found].mean_kl

    def _steps(self, solution: Solution) -> int:
        """Refinement steps to take."""
        if self.search.budget is None:
            return 0
        if self.search.refine is not None:
            return self.search.refine
        if solution.loss <= REFINE_ABOVE or self.search.solver not in EXACT:
            return 0
        try:
            return REFINE_STEPS if self.truth else 0
        except ValueError as error:
            self.reporter.say(f"Not refined: {error}")
            return 0

    def _refine(self, problem: Problem, solution: Solution, steps: int) -> Refined:
        oracle = self.truth.oracle(max_tokens=1 << 62)
        return refine(
            problem,
            self.budget.bytes,
            solution.choice,
            self.truth.linearize,
            oracle,
            steps=steps,
            report=self._step,
        )

    def _step(self, step: Step) -> None:
        self.job.log("refinement candidate", **asdict(step))
        self.reporter.say(
            f"Step {step.number}: {step.changed} units changed, KL {step.difference:+.4f} ± "
            f"{step.difference_stderr:.4f} {self.words.nats}"
            + (", accepted" if step.accepted else "")
        )

    def _refined_plans(
        self, problem: Problem, solution: Solution, refined: Refined
    ) -> dict[str, Plan]:
        if len(refined.choices) == 1:
            return {}
        plan = self._plan(problem, problem.evaluate(refined.choice, solution.lower_bound))
        note = Refinement(
            steps=len(refined.choices) - 1, kl_before=refined.kl[0], kl_after=refined.kl[-1]
        )
        return {"refined plan": plan.model_copy(update={"refinement": note})}

    def _plan(self, problem: Problem, solution: Solution, solver: str | None = None) -> Plan:
        choice, cache = solution.choice, None
        if self.goal.kv is not None:
            choice, bits = split_choice(problem, choice, self.units)
            rows = np.arange(self.units, len(problem.units))
            picked = solution.choice[self.units :]
            cache = KVCache(
                bits=bits,
                context=self.search.context,
                batch=self.search.batch,
                bytes=int(problem.bytes[rows, picked].sum()),
                predicted_kl=float(problem.loss[rows, picked].sum()),
            )
        return plan_from_choice(
            self.table,
            choice,
            solver or self.search.solver,
            lower_bound=solution.lower_bound,
            budget=self.budget,
            kv_cache=cache,
            resident_bytes=self.goal.resident_bytes(self.table, choice),
            latency=self.goal.latency_of(self.table, choice),
            runtime=self.search.runtime,
            note=solution.note or None,
            command=self.search.command,
        )

    def _uniform_plans(
        self, problem: Problem, solution: Solution, plans: Mapping[str, Plan]
    ) -> dict[str, Plan]:
        """Uniform plans within the budget and the smallest one above it, by name.

        Those that break a further limit are no rivals.
        """
        rivals = {
            name: self._plan(problem, problem.evaluate(choice, solution.lower_bound), "uniform")
            for name, choice in uniform_choices(problem).items()
            if all(
                c.cost[np.arange(len(choice)), choice].sum() <= c.limit for c in problem.constraints
            )
        }
        size = self.goal.size_of
        most = size(next(iter(plans.values()))) if self.search.fastest else self.budget.bytes
        larger = sorted(size(p) for p in rivals.values() if size(p) > most)
        limit = larger[0] if larger and self.goal.kv is None else most
        ours = [(p.assignments, p.kv_cache) for p in plans.values()]
        kept = {
            f"uniform {name}": p
            for name, p in rivals.items()
            if size(p) <= limit and (p.assignments, p.kv_cache) not in ours
        }
        if self.goal.kv is not None:  # every pair of widths would be too many to measure
            best = sorted(kept, key=lambda name: kept[name].predicted_kl)[:6]
            kept = {name: kept[name] for name in best}
        return kept

    def _confidence(
        self,
        problem: Problem,
        plan: Plan,
        solution: Solution,
        refined: Refined | None,
    ) -> None:
        """Bootstrap the prices that the shipped plan was solved from."""
        path = self.run / CONFIDENCE_FILE
        path.unlink(missing_ok=True)
        skip = self._no_confidence(problem, plan)
        if skip or not self.search.bootstrap:
            if skip:
                self.reporter.say(f"No bootstrap: {skip}")
            return
        problem = replace(problem, oracle=None)
        choice = solution.choice
        reprice, sequences = None, None
        if plan.refinement is not None and refined is not None and refined.last is not None:
            reprice, sequences = refined.last.loss, len(refined.last.prices.first)
            loss = np.where(problem.allowed, refined.last.loss(), np.inf)
            problem = replace(problem, loss=loss, scores=None)
            choice = refined.choice
        elif self.table.scores is not None and self.table.diagonal is not None:
            kinds = [unit.kind for unit in self.table.units]
            shrinkage = Shrinkage(self.table.scores, self.table.diagonal, kinds)
            reprice, sequences = shrinkage.prices, len(self.table.scores)
        with self.reporter.bar("Bootstrap", self.search.bootstrap) as advance:
            found: Confidence = bootstrap(
                problem,
                self.budget.bytes,
                choice,
                reprice=reprice,
                sequences=sequences,
                resamples=self.search.bootstrap,
                seed=self.settings.seed,
                advance=advance,
            )
        found.save(path)
        for line in found.summary(self.words.drawn):
            self.reporter.say(line)

    def _no_confidence(self, problem: Problem, plan: Plan) -> str:
        """Why prices cannot be resampled; empty if they can."""
        if plan.solver == "uniform":
            return "a uniform plan measured best, which no price decides."
        if plan.solver not in EXACT:
            return f"resamples are solved exactly, which the {plan.solver!r} solver does not do."
        table, drawn = self.table, self.words.drawn
        if table.scores is None or len(table.scores) < 2:
            return f"the metric {table.provenance['metric']!r} has no scores of several {drawn}."
        squares = (table.scores.astype(np.float64) ** 2).mean(axis=0)
        if table.diagonal is None and not np.allclose(squares, table.kl, rtol=1e-3):
            return f"prices of the metric {table.provenance['metric']!r} are no mean of squares."
        if problem.constraints or self.goal.kv is not None or self.search.fastest:
            return "only plans under a single budget of bytes are resampled."
        return ""

    @property
    def truth(self) -> Truth:
        """The model as solvers may ask it, on sequences kept apart."""
        if self._truth is None:
            work = self.goal.work
            inside, apart = self._kept or guarded(
                work.model, self.settings, work.samples, self.search.guard
            )
            self._truth = Truth(
                work.model,
                work.renderer,
                self.table,
                inside,
                apart,
                self.run,
                self.settings.seed,
                self.reporter,
            )
        return self._truth


def _evaluation(model: LoadedModel, settings: ProfileSettings, search: SearchSettings) -> Samples:
    if model.is_language_model and _is_same_text(search.evaluation, settings.calibration):
        raise ValueError(
            f"{search.evaluation} is both --calibration and --eval: a plan measured on the text it "
            "was made from proves nothing. Give another text to one of them."
        )
    return evaluation_samples(model, search.evaluation, search.eval_tokens, settings.length)


def _is_same_text(first: str, second: str) -> bool:
    files = [Path(name) for name in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
