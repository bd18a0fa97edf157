"""The workbench in a notebook: widgets over a ``Session``."""

import asyncio
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from thermo_lib.evaluation.demo import MASKED
from thermo_lib.evaluation.display import MARKED, OTHERS, OURS
from thermo_lib.evaluation.figures import lines, parameter_over_time
from thermo_lib.evaluation.statistics import side_of_zero
from thermo_lib.extras import needs
from thermo_lib.workbench.choices import ACTIVATION_BITS, GROUP_SIZES, MOST, NAMED, SMOOTHING, WEIGHTS, Choice
from thermo_lib.workbench.job import Job
from thermo_lib.workbench.session import Session, View, differences

_WIDE = {"description_width": "130px"}
_GIVEN, _MASKED = "color:#777777", "color:#c0c0c0"  # a clue or a prompt; what isn't filled yet
_FILLED, _MARKED = "font-weight:bold", f"background:{MARKED};font-weight:bold"  # by a model; where both differ
_SECONDS = 0.5  # between two looks at a job


def summary(view: View) -> str:
    """What a view's numbers say, as HTML."""
    low, high = view.total_ci
    rows = [
        ("path KL to full precision", f"{view.total:.1f} nats ({low:.1f} to {high:.1f}, {view.sequences} sequences)"),
    ]
    if view.change is not None and view.change_ci is not None:
        low, high = view.change_ci
        word = side_of_zero(view.change_ci, "lower", "higher", "can't be told apart")
        rows.append(("against the choice before", f"{view.change:+.2f} nats ({low:+.2f} to {high:+.2f}): {word}"))
    if view.smoothness is None:
        rows.append(("Markov score", "none: nothing depends on the timestep"))
    else:
        each = ", ".join(f"step {step}: {score:.2f}" for step, score in view.smoothness.boundary_scores.items())
        rows.append(("Markov score", f"{view.smoothness.score:.3f}" + (f" (boundaries at {each})" if each else "")))
    rows.append(("stored", f"{view.bits_per_weight:.2f} bits a weight, the model {view.megabytes:.1f} MB"))
    rows.append(("shown in", f"{view.seconds:.1f} s"))
    cells = "".join(f"<tr><td><b>{html.escape(a)}</b></td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in view.notes)
    return f"<table>{cells}</table>{notes}"


def tokens_html(view: View, step: int) -> str:
    """Both models' texts at one step of the denoising: what is given is grey, tokens that differ are marked."""
    marks = differences(view.texts, step)
    lines = []
    for name, steps in view.texts.items():
        words = [f'<span style="{_GIVEN}">{html.escape(view.prompt)}</span>'] if view.prompt else []
        for word, clue, differs in zip(steps[step], view.given, marks, strict=True):
            is_masked = word == MASKED
            shown = html.escape(clue if is_masked and clue else word).replace("\n", "⏎<br>")
            is_marked = differs and name == "quantized"
            style = _MARKED if is_marked else _MASKED if is_masked else _GIVEN if clue else _FILLED
            words.append(f'<span style="{style}">{shown}</span>')
        text = "".join(words)
        lines.append(f'<td style="padding-right:40px;vertical-align:top"><b>{name}</b><pre>{text}</pre></td>')
    count = sum(marks)
    said = f"step {step} of {len(view.texts['quantized']) - 1}: {count} token{' differs' if count == 1 else 's differ'}"
    given = "clues are grey, pale until the model has copied them" if any(view.given) else "the prompt is grey"
    return f"<table><tr>{''.join(lines)}</tr></table><p>{said}; {given}, what the model fills is bold</p>"


def copy_html(code: str) -> str:
    """A button that copies lines to the clipboard, by the browser itself; it says whether it could."""
    return (
        f'<button class="jupyter-button widget-button" style="width:148px" data-code="{html.escape(code)}" '
        'onclick="const say = text => { this.textContent = text }; navigator.clipboard ? '
        "navigator.clipboard.writeText(this.dataset.code).then(() => say('Copied'), () => say('Not allowed here')) : "
        "say('Not allowed here')\">Copy as code</button>"
    )


def figure(view: View, last: View | None) -> Any:
    """Parameters over the timesteps before and after smoothing, and path KL of each step against the view before."""
    plt = needs("matplotlib.pyplot")
    count = 3 if last is not None and view.changes else 2
    drawn, axes = plt.subplots(1, count, figsize=(5 * count, 3.6), layout="constrained")
    left, middle = axes[:2]
    if view.before:
        label, after = "scale of the layer's input", {"smoothed": view.after}
        parameter_over_time(view.layer, view.before, after, ylabel=label, ours=("smoothed",), ax=left)
    else:
        left.text(0.5, 0.5, "nothing depends on the timestep", ha="center", transform=left.transAxes)
    shown = ({} if last is None else {"before": last}) | {"this choice": view}
    title = "How far from full precision at each step"
    values = {name: one.path_kl for name, one in shown.items()}
    lines(values, ylabel="path KL (nats a sequence), 95 %", title=title, ours=("this choice",), ax=middle)
    for one in shown.values():
        _band(middle, one.path_kl_ci, OURS if one is view else OTHERS)
    middle.set(ylim=(0, None))
    if count == 3:
        title, label = "This choice minus the one before", "change (nats a sequence), 95 %"
        lines({"change": view.changes}, ylabel=label, title=title, ours=("change",), ax=axes[2])
        _band(axes[2], view.changes_ci, OURS)
        axes[2].axhline(0, color="black", linewidth=1, linestyle="--")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    plt.close(drawn)
    return drawn


def _band(ax: Any, intervals: Sequence[tuple[float, float]], color: str) -> None:
    """The intervals of a line, in its colour."""
    low, high = zip(*intervals, strict=True)
    ax.fill_between(range(len(low)), low, high, color=color, alpha=0.2, linewidth=0)


def _activation_bits(is_preset: bool) -> tuple[tuple[str, int | None], ...]:
    """What activations can have, beside what a preset has."""
    plain = tuple((f"{bits}, not quantized" if bits == 16 else str(bits), bits) for bits in ACTIVATION_BITS)
    return (("as the preset has them", None), *plain) if is_preset else plain


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Workbench:
    """Widgets to choose with, and what is shown of the choice.

    Args:
        session: what computes it.

    Attributes:
        panel: the whole, to be displayed.
        view: what is shown; None before anything could be.
    """

    def __init__(self, session: Session):
        widgets = needs("ipywidgets")
        self.session = session
        self.view: View | None = None
        self._last: View | None = None
        self._job: Job | None = None
        self._watching: asyncio.Future[None] | None = None
        self._is_choosing = False
        first = Choice()
        self.weights = widgets.Dropdown(options=list(WEIGHTS), value=first.weights, description="weights")
        self.weight_bits = widgets.FloatText(first.weight_bits, step=1, description="weight bits")
        sizes = [(size or "whole row", size) for size in GROUP_SIZES]
        self.group_size = widgets.Dropdown(options=sizes, value=first.group_size, description="weights a scale")
        self.bits = widgets.Dropdown(
            options=_activation_bits(False), value=first.activation_bits, description="activation bits"
        )
        self.dynamic = widgets.Checkbox(first.is_dynamic, description="dynamic ranges")
        most = session.timesteps
        self.groups = widgets.IntSlider(first.time_groups, 1, most, description="time groups", continuous_update=False)
        methods = [("none" if method is None else method, method) for method in SMOOTHING]
        self.smoothing = widgets.Dropdown(options=methods, value=first.smoothing, description="smoothing")
        most = MOST["window"]
        self.window = widgets.IntSlider(first.window, 1, most, description="window (steps)", continuous_update=False)
        self.layer = widgets.Dropdown(options=session.layers, description="layer")
        self.step = widgets.IntSlider(session.timesteps, 0, session.timesteps, description="denoising step")
        self.prompt = widgets.Text(description="own prompt", placeholder="code to continue; empty for a 4x4 Sudoku")
        self.prompt.continuous_update = False
        self.message = widgets.HTML()
        self.numbers, self.texts, self.chart = widgets.HTML(), widgets.HTML(), widgets.Image(format="png")
        self.make, self.stop = widgets.Button(description="Make"), widgets.Button(description="Stop")
        self.progress = widgets.FloatProgress(0, min=0, max=1, layout={"width": "200px"})
        self.copy, self.code = widgets.HTML(), widgets.Button(description="Show the code")
        self.save = widgets.Button(description="Save as")
        self.name = widgets.Text(value="model", layout={"width": "120px"})
        self.lines = widgets.Textarea(layout={"width": "100%", "height": "260px", "display": "none"})
        activations = (self.bits, self.dynamic, self.groups, self.smoothing, self.window)
        choosers = (self.weights, self.weight_bits, self.group_size, *activations, self.layer)
        for chooser in (*choosers, self.step, self.prompt):
            chooser.style = _WIDE
        self.weights.observe(lambda _: self._choose_weights(), "value")
        for chooser in choosers[1:]:
            chooser.observe(lambda _: self.update(), "value")
        self.step.observe(lambda _: self._show_texts(), "value")
        self.prompt.observe(lambda _: self._ask(), "value")
        for button, act in ((self.make, self._make), (self.stop, self._stop), (self.code, self._code)):
            button.on_click(lambda _, act=act: self._said(act))
        self.save.on_click(lambda _: self._said(self._save))
        self._buttons(False)
        making = widgets.HBox([self.make, self.stop, self.progress])
        taking = [widgets.HBox([self.copy, self.code]), widgets.HBox([self.save, self.name])]
        chosen = widgets.VBox([*choosers, making, *taking, self.message])
        shown = widgets.VBox([self.numbers])
        below = widgets.VBox([self.prompt, self.step, self.texts])
        self.panel = widgets.VBox([widgets.HBox([chosen, shown]), self.chart, below, self.lines])
        self.update()

    @property
    def choice(self) -> Choice:
        """What is chosen now."""
        return Choice(
            weights=self.weights.value,
            weight_bits=self.weight_bits.value,
            group_size=self.group_size.value,
            activation_bits=self.bits.value,
            is_dynamic=self.dynamic.value,
            time_groups=self.groups.value,
            smoothing=self.smoothing.value,
            window=self.window.value,
            layer=self.layer.value,
        )

    def _choose_weights(self) -> None:
        """Offer what the chosen weights can have: a preset comes with bits and activations of its own."""
        is_preset = self.weights.value in NAMED
        for field in (self.weight_bits, self.group_size):
            field.disabled = is_preset
        before, options = self.bits.value, _activation_bits(is_preset)
        if self.bits.options != options:
            self._is_choosing = True
            self.bits.options = options
            self.bits.value = None if is_preset else 4 if before is None else before
            self._is_choosing = False
        self.update()

    def update(self) -> None:
        """Show the present choice; weights that aren't made yet are named with the time that they take."""
        if not self._is_choosing:
            self._said(self._update)

    def _offer_code(self, choice: Choice) -> None:
        try:
            code = self.session.code(choice)
        except ValueError:
            self.copy.value = ""  # not the lines of another choice
            raise
        self.copy.value = copy_html(code)
        if self.lines.value:
            self.lines.value = code

    def _update(self) -> str:
        choice = self.choice
        self._offer_code(choice)
        if not self.session.is_ready(choice):
            self._buttons(True)
            seconds = self.session.seconds_of(choice)
            return f"{choice.name}: not made yet; Make takes about {_time(seconds)} on this machine."
        self._buttons(False)
        self._last, self.view = self.view, self.session.show(choice)
        self.numbers.value = summary(self.view)
        self.chart.value = _png(figure(self.view, self._last))
        self._show_texts()
        return ""

    def _said(self, act: Callable[[], str]) -> None:
        """Do something, and say in one line what is the matter where it can't be done; the rest goes on."""
        try:
            said = act()
        except (ValueError, OSError) as error:
            said = f"error: {error}"
        self.message.value = f"<p><b>{html.escape(said)}</b></p>" if said else ""

    def _show_texts(self) -> None:
        if self.view is not None:
            self.texts.value = tokens_html(self.view, min(self.step.value, len(self.view.texts["quantized"]) - 1))

    def _ask(self) -> None:
        def ask() -> str:
            if self.prompt.value:
                self.session.ask(self.prompt.value)
            else:
                self.session.ask_puzzle()
            return self._update()

        self._said(ask)

    def _buttons(self, can_make: bool) -> None:
        is_running = self._job is not None and self._job.is_running
        self.make.disabled, self.stop.disabled = not can_make or is_running, not is_running

    def _make(self) -> str:
        choice = self.choice
        self._job = self.session.make(choice)
        self._buttons(True)
        self._watching = asyncio.ensure_future(self._watch(self._job, choice))
        return f"{choice.name}: being made"

    async def _watch(self, job: Job, choice: Choice) -> None:
        while job.is_running:
            done = job.progress
            self.progress.value = done.share
            words = [choice.name + ": being made", done.what, done.left and f"{done.left} left in this part"]
            self.message.value = html.escape(", ".join(word for word in words if word))
            await asyncio.sleep(_SECONDS)
        self._said(job.result)
        self.progress.value = 0.0
        self._buttons(not self.session.is_ready(choice))
        if self.session.is_ready(choice) and self.choice.name == choice.name:
            self.update()

    def _stop(self) -> str:
        if self._job is None:
            return ""
        self._job.stop()
        return self._job.result()

    def _code(self) -> str:
        self.lines.value, self.lines.layout.display = self.session.code(self.choice), "flex"
        return "The lines are below."

    def _save(self) -> str:
        return f"Saved in {self.session.save(self.choice, self.name.value)}; load_quantized reads it."


def _png(drawn: Any) -> bytes:
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=90)
    return content.getvalue()
