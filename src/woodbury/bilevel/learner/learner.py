"""Hyperparameters learned inside an existing training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from woodbury.bilevel.learner.adjoint import Adjoint, with_rates
from woodbury.bilevel.learner.hyper import Hypers, named_hypers, unwrapped
from woodbury.bilevel.learner.learning_rates import LearningRates
from woodbury.bilevel.learner.losses import Losses, no_training_batch
from woodbury.bilevel.learner.processes import Processes
from woodbury.bilevel.learner.report import HyperReport
from woodbury.bilevel.learner.weight_decay import WeightDecay
from woodbury.bilevel.problem import Bilevel
from woodbury.curvature.batches import Batch
from woodbury.curvature.functions import Selection, select_parameters
from woodbury.errors import ArgumentError, NonFiniteError
from woodbury.solvers import Neumann, Recipe, SolveStatus

__all__ = ["HyperLearner"]

_TERMS = 3


class HyperLearner:
    r"""Adds hyperparameter learning to a training loop that exists.

    The loop keeps its model, optimizer and loaders. It takes its loss from :meth:`loss`, into which
    the hyperparameters enter, and every so often calls :meth:`step` with a batch of validation
    data:

        learner = HyperLearner(model, "cross_entropy", [WeightDecay(model)], optimizer=optimizer)
        for number, batch in enumerate(loader):
            optimizer.zero_grad()
            learner.loss(batch).backward()
            optimizer.step()
            if number % 10 == 9:
                learner.step(next(validation))

    With $g$ the training loss on the last batch, $f$ the validation loss on the batch given and
    $H = \nabla^2_{ww} g$, a step takes the gradient

    $$\frac{dF}{d\lambda} = - \nabla^2_{\lambda w} g \; H^{-1} \nabla_w f$$

    at the weights as they are, and gives it to a torch optimizer of the hyperparameters. Both
    losses are means over the rows of their batch. :class:`~woodbury.bilevel.LearningRates` are
    differentiated through the last step of the optimizer instead.

    The training loss is differentiated with every submodule in the mode (training or evaluation) of
    the last call of :meth:`loss`, batch norm with the statistics of the batch and dropout with
    random numbers of its own, the same for all products; the validation loss in evaluation mode.
    Nothing of the training is changed: not the gradients, buffers and modes of the model, nor the
    state of the random numbers. Under autocast, :meth:`loss` is what the loop makes it, and a step
    computes in the dtype of the parameters.

    With ``DistributedDataParallel`` every process makes the same learner (of all examples, where
    they have weights), calls ``step`` when the others do, each with its own batches, and all get
    the gradient of the joined batch.

    Args:
        model: the module that is trained, wrapped or not.
        criterion: ``"cross_entropy"``, ``"mse"``, a loss module of torch or a callable
            ``(output, target)`` that returns losses ``[B]``; or a mapping from names to these,
            whose sum (weighted by :class:`~woodbury.bilevel.LossWeights`) is the training loss.
        hypers: one or several hyperparameters, or a mapping that names them; names default to those
            of their classes.
        optimizer: that of the training. Its learning rates are the step $\alpha$ of the Neumann
            series. Its own ``weight_decay`` is not part of the loss that is differentiated.
        hyper_optimizer: makes the optimizer of the hyperparameters from parameter groups, one for
            each hyperparameter; default ``partial(torch.optim.Adam, lr=1e-2)``.
        recipe: how to solve with $H$; default ``Neumann(terms=3)``. A ``Neumann`` without a step
            takes the learning rate of ``optimizer`` at that moment (one per parameter group, where
            they differ): its ``K + 1`` summands are then those of ``K + 1`` unrolled steps of SGD.
        outer: the validation criterion; default ``criterion``. Needed where that is a mapping.
        params: which parameters are $w$: names, a list, or a function
            ``(name, parameter) -> bool``; default all that require a gradient.
        certify_every: the residual of a Neumann series costs a Hessian product where all
            hyperparameters are weight decays (it is free otherwise); it is spent in the first
            of so many steps.
        on_failure: what happens when the linear solve fails (the series diverges, the budget of
            steps ends): ``"warn"``, once for each kind of failure, and use its best iterate,
            ``"raise"`` with nothing changed, or ``"ignore"``. The report has the status.
        seed: of the random numbers of dropout in the training loss.

    Attributes:
        hypers: the hyperparameters by name.
        hyper_optimizer: their optimizer.
        steps: number of calls of :meth:`step`.

    Raises:
        ArgumentError: no hyperparameter, names that clash or hold a dot, a mapping of criteria
            without ``outer``, no step for the series, or an argument out of its range.
        GradientError: nothing to differentiate.

    Cost: of a step, with K terms: a gradient of each loss, K Hessian products (some 1.5 gradients
    each) and a mixed product, which is as much as a Hessian product, or nothing for weight decays;
    memory of the graph of a gradient (2 to 3 times that of a gradient) and of some 5 vectors of the
    parameters, beside the hyperparameters and their optimizer.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
    Differentiation" (AISTATS 2020), algorithm 1.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import HyperLearner, WeightDecay
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> decay = WeightDecay(model, 1e-2)
        >>> learner = HyperLearner(model, "mse", decay, optimizer=optimizer)
        >>> train, validation = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(2)]
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     learner.loss(train).backward()
        ...     optimizer.step()
        ...     report = learner.step(validation)
        >>> report.status.name, report.products
        ('completed', 3)
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        hypers: Hypers,
        *,
        optimizer: Optimizer | None = None,
        hyper_optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        recipe: Recipe | None = None,
        outer: Any = None,
        params: Selection = None,
        certify_every: int = 10,
        on_failure: Literal["raise", "warn", "ignore"] = "warn",
        seed: int = 0,
    ) -> None:
        if certify_every < 1:
            raise ArgumentError(f"certify_every is {certify_every}; it must be at least 1")
        if on_failure not in ("raise", "warn", "ignore"):
            raise ArgumentError(f"on_failure is {on_failure!r}; use 'raise', 'warn' or 'ignore'")
        if outer is None and isinstance(criterion, Mapping):
            raise ArgumentError(
                f"criterion has the terms {list(criterion)}; say with outer=... what the "
                "hyperparameters are to minimise on validation data"
            )
        self.model, self.optimizer = model, optimizer
        self.recipe = Neumann(_TERMS) if recipe is None else recipe
        self.certify_every, self.on_failure, self.seed = certify_every, on_failure, seed
        self.steps = 0
        inside = unwrapped(model)
        self._params = select_parameters(inside, params)
        self._device = next(iter(self._params.values())).device
        self.hypers = {name: h.to(self._device) for name, h in named_hypers(hypers).items()}
        self._decays = {n: h for n, h in self.hypers.items() if isinstance(h, WeightDecay)}
        self._rates = {n: h for n, h in self.hypers.items() if isinstance(h, LearningRates)}
        self._processes = Processes(model)
        validation = criterion if outer is None else outer
        self._losses = Losses(
            inside, criterion, validation, self.hypers, self._params, self._processes
        )
        self._tensors = self._losses.tensors
        self._processes.start_alike(list(self._tensors.values()))
        groups = [{"params": list(h.parameters()), "name": n} for n, h in self.hypers.items()]
        make = hyper_optimizer or (lambda given: torch.optim.Adam(given, lr=1e-2))
        self.hyper_optimizer = make(groups)
        # Of the hyperparameters learning rates enter neither loss, and decays in closed form.
        apart = [f"{name}.log_rates" for name in self._rates]
        closed = [f"{name}.log_decay" for name in self._decays]
        self._implicit = [name for name in self._tensors if name not in apart]
        self._entering = [name for name in self._implicit if name not in closed]
        self._last: tuple[Any, list[bool]] | None = None
        self._warned: set[SolveStatus] = set()
        self._problem = Bilevel(
            self._losses.inner,
            self._losses.outer,
            self._params,
            {name: self._tensors[name] for name in self._implicit} or self._tensors,
            reduce=self._processes.mean,
        )
        if self._implicit:
            with_rates(self.recipe, optimizer, self._params)  # says at once what is missing

    # --------------------------------------------------------------------------- in the loop

    def loss(self, batch: Any) -> Tensor:
        """The training loss of a batch, a scalar to call ``backward`` on; remembers the batch.

        The model is called as it is, in its mode, and updates its buffers as always. The
        hyperparameters are constants of this loss.

        Args:
            batch: ``(inputs, targets)``, ``(inputs, targets, indices)`` or a mapping with
                ``labels`` and perhaps ``indices``, on the device of the model.

        Raises:
            DataError: the batch is empty, of another form, or has no or unknown indices where they
                are needed.
            ShapeError: the losses of the criterion do not fit the batch.
        """
        modes = self._losses.modes()
        value = self._losses.training.evaluate(self.model, batch)
        for decay in self._decays.values():
            value = value + decay.penalty(self._params)
        self._last = batch, modes
        return value

    def step(self, validation: Any, train: Any = None) -> HyperReport:
        """One hypergradient, and one step of the optimizer of the hyperparameters.

        Args:
            validation: a batch of validation data, ``(inputs, targets)`` or a mapping.
            train: the training batch; default the last that :meth:`loss` was given.

        Returns:
            A :class:`~woodbury.bilevel.HyperReport`.

        Raises:
            DataError: an empty batch, unknown indices, or no training batch so far.
            GradientError: the validation loss does not depend on the weights, the training loss not
                on a weight or a hyperparameter or on a tensor from outside that requires a
                gradient; parameters were frozen or replaced since the learner was made, or the
                model changes them in its forward pass.
            NonFiniteError: a loss or a gradient is NaN or infinite; nothing has been changed.
            SolveError: the solve failed, and ``on_failure`` is ``"raise"``; nothing has changed.
        """
        report = self.hypergradient(validation, train)
        for name, gradient in report.value.items():
            self._tensors[name].grad = gradient
        self.hyper_optimizer.step()
        self.hyper_optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for hyper in self.hypers.values():
                hyper.project()
        for rates in self._rates.values():
            rates.write()
        self.steps += 1
        return report

    def hypergradient(self, validation: Any, train: Any = None) -> HyperReport:
        """The hypergradient alone, as :meth:`step` takes it; nothing is changed."""
        data, modes = {"validation": validation}, self._losses.modes()
        if self._implicit:
            if train is None:
                if self._last is None:
                    raise no_training_batch()
                train, modes = self._last
            data["training"] = train
        for rates in self._rates.values():
            rates.follow()
        with torch.inference_mode(False), torch.autocast(self._device.type, enabled=False):
            batches = self._losses.freeze(data, modes, self._implicit, self.seed, self.steps)
            report = self._at(batches)
        for name, gradient in report.value.items():
            # A sum is finite where all entries are, but for an overflow.
            if not (torch.isfinite(gradient.sum()) or torch.isfinite(gradient).all()):
                raise NonFiniteError(
                    f"the hypergradient of {name} holds NaN or infinity; nothing was changed. Look "
                    f"at the solve: {report.certificate()}"
                )
        return report

    def _at(self, batches: Mapping[str, Batch]) -> HyperReport:
        outer_value, slope, _ = self._problem.gradient_parts("outer", batches["validation"])
        outer_value = self._processes.mean_of(outer_value)
        views = self._problem.space.unflatten(slope)
        slopes = {id(p): views[name] for name, p in self._params.items()}
        of_rates = {f"{n}.log_rates": h.gradient(slopes) for n, h in self._rates.items()}
        if not self._implicit:
            return HyperReport(of_rates, outer_value)
        adjoint = Adjoint(
            self._problem,
            batches["training"],
            self._decays,
            self._entering,
            self.on_failure,
            self._warned,
        )
        recipe = with_rates(self.recipe, self.optimizer, self._params)
        certify = self.steps % self.certify_every == 0
        solution, mixed = adjoint.solve(slope, recipe, certify=certify)
        space = self._problem.space
        return HyperReport(
            value={name: mixed[name].neg_() for name in self._implicit} | of_rates,
            outer_value=outer_value,
            inner_value=self._processes.mean_of(adjoint.value) + self._penalty(),
            stationarity=space.norm(adjoint.gradient).item(),
            outer_error=space.inner(solution.value, adjoint.gradient).item(),
            residual=float(solution.residual),
            status=solution.status,
            products=solution.products,
        )

    def _penalty(self) -> float:
        weights = {name: p.detach() for name, p in self._params.items()}
        return sum(decay.penalty(weights).item() for decay in self._decays.values())

    # ------------------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters, their optimizer and counters: with the model's, all there is to save."""
        for rates in self._rates.values():
            rates.follow()
        return {
            "hypers": {
                name: {key: value.clone() for key, value in hyper.state_dict().items()}
                for name, hyper in self.hypers.items()
            },
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "steps": self.steps,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: the same steps, to the bit, as without interruption.

        Learning rates are written into the optimizer of the training.

        Raises:
            ArgumentError: the state is of other hyperparameters.
        """
        theirs = {n: {k: v.shape for k, v in t.items()} for n, t in state["hypers"].items()}
        ours = {
            name: {key: value.shape for key, value in hyper.state_dict().items()}
            for name, hyper in self.hypers.items()
        }
        if theirs != ours:
            raise ArgumentError(f"the state is of the hyperparameters {theirs}, these are {ours}")
        for name, tensors in state["hypers"].items():
            self.hypers[name].load_state_dict(tensors)
        self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])
        self.steps, self.seed = state["steps"], state["seed"]
        for rates in self._rates.values():
            rates.restore()
