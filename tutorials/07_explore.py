# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)][colab]
#
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/07_explore.ipynb
#
# # Explore with the mouse
#
# **Question.** A toy follows arrows: `A b` says that A leads to b. It makes one hop in every loop. What happens to the hops if
# attention stops changing, if a loop is left out, or if the mapping is another one?
#
# **Experiment.** We ask on the explorer's screen first, and then do the same in Python, with the script that the screen gives.
# Without a kernel there are pictures of the screen here, on which nothing can be clicked.
#
# *Outputs and numbers: `python tutorials/build.py 07_explore`, two cores of a server, November 2026.*

# %%
try:
    import google.colab  # noqa: F401

    # %pip install -q 'tl-looped[viz,explore]'
except ImportError:
    pass

# %%
import torch
from IPython.display import display

from tl_looped import LoopedBridge, explore, interventions
from tl_looped.explorer import Session, unpacked
from tl_looped.lenses import logit_lens
from tl_looped.metrics import logit_diff
from tl_looped.patching import patch_sweep

torch.set_grad_enabled(False)
MODEL = "toy:hop"  # what is said here is about this toy; another model needs other prompts
model = LoopedBridge.from_pretrained(MODEL, device="cpu")
PROMPT, OTHER = "A b B c C d D a ? A", "A c B d C b D a ? A"

# %% [markdown]
# ## The screen
#
# Rows are layers, grouped by loop, columns are positions. Every cell has the token that the model would say next if it went
# from there straight to its output. Look down the last column: b, c, d, a, b, c, one hop more in every loop.
#
# - Click a cell: its ten most probable tokens, with their probabilities. A click on one of them follows it over all layers.
# - Move the slider to 12 loops. Rows beyond the trained six are marked with `›`.
# - Open **Interventions**, choose "freeze attention from a loop", loop 2, layers and heads `all`, and add it. Choose
#   "difference" under **Show**: the framed cells have another answer.
# - Open **Patch from a second prompt** and sweep every cell.

# %% tags=["picture:explorer.png"]
widget = explore(model, state={"prompt": PROMPT, "other": OTHER, "pins": ["b", "c", "d", "a"]})
display(widget)

# %% [markdown]
# `widget.state` is what the screen shows, and `explore(model, state=...)` shows it again. This state has the intervention of
# above too.

# %% tags=["picture:explorer_edits.png"]
state = {
    "prompt": PROMPT,
    "other": OTHER,
    "pins": ["b", "c", "d", "a"],
    "edits": [{"kind": "freeze_attention", "from_loop": 2, "layers": "all", "heads": "all"}],
    "show": "difference",
}
explore(model, state=state)

# %% [markdown]
# ## The same in Python
#
# "Copy as Python" gives the calls behind the screen. What answers the screen is a `Session`, and we can ask it ourselves.

# %%
session = Session(model)
print(session.answer({"ask": "script", "state": state})["script"])

# %% [markdown]
# These are ordinary calls: hooks of an intervention, and a lens over the run with these hooks.

# %%
hooks = interventions.freeze_attention(model, 2)
with model.hooks(fwd_hooks=hooks):
    frozen = logit_lens(model, PROMPT, lens="native")
frozen.plot("tokens")

# %% [markdown]
# Up to loop 2 the toy answers b, c, d. From then on it looks where it looked in loop 2, and stays at d: each hop is one step of
# attention to another place. An edited run differs from the unedited one where attention is frozen, and nowhere before.

# %%
whole = logit_lens(model, PROMPT, lens="native")
changed = (frozen.top_tokens != whole.top_tokens)[:, 0, :, 0]
for label, row in zip(whole.labels, changed.sum(1).tolist(), strict=True):
    print(f"{label:20} {row} of {changed.shape[1]} answers changed")

# %% [markdown]
# ## Another mapping, patched in
#
# "Sweep every cell" is `patch_sweep`: the activation of a run of the second prompt goes into the run of the first, one cell at
# a time. 0 is the answer of the first prompt, 1 that of the second.

# %%
_, cache = model.run_with_cache(OTHER)
metric = logit_diff("b", "c")  # the sixth hop from A is b in the second mapping, c in the first
sweep = patch_sweep(model, PROMPT, cache, metric, axes=("virtual_layer", "pos"), verbose=False).normalised()
sweep.plot(title="Which cells carry the other mapping to the answer")

# %% [markdown]
# The entries of the mapping carry the answer until they are read, then the last position does. On the screen, the colour
# "effect of a patch" shows the same numbers.

# %% [markdown]
# ## Exercise
#
# Add "skip a loop" with loop 1, and choose the lens "readout", which has a row for every loop. Which hop is answered after the
# last loop? Guess first.
#
# <details><summary>Answer</summary>
#
# b, b, c, d, a, b: the state waits for one loop, and every later hop comes one loop later. The toy does not count its loops;
# each of them makes a hop from wherever the state is.
#
# </details>

# %% tags=["remove-cell"]
grid = session.answer({"ask": "grid", "state": state})
torch.testing.assert_close(unpacked(grid["edited"]["top"])[..., 0], frozen.top_tokens[:, 0, :, 0].int())
last = [frozen.text(int(t)) for t in frozen.top_tokens[2::2, 0, -1, 0]]
assert last == ["b", "c", "d", "d", "d", "d"], last
assert [whole.text(int(t)) for t in whole.top_tokens[2::2, 0, -1, 0]] == ["b", "c", "d", "a", "b", "c"]
assert int(changed[:7].sum()) == 0 and int(changed[7:].sum()) > 0
torch.testing.assert_close(unpacked(session.answer({"ask": "sweep", "state": {**state, "edits": []}})["values"]), sweep.values)
with model.hooks(fwd_hooks=interventions.skip_loop(model, 1)):
    assert [top[0] for top in model.answers(PROMPT).texts[0]] == ["b", "b", "c", "d", "a", "b"]

# %% [markdown]
# ## Where to go
#
# - The same page without a notebook: `tl-looped explore toy:hop`, or a checkpoint of your own. [Explorer](../docs/explorer.md)
#   says what holds, and which messages a session answers.
# - [Activation patching across loops](02_activation_patching_across_loops.ipynb) goes on from the sweep, and
#   [Lenses and attribution](03_lenses_and_attribution.ipynb) from the grid.
