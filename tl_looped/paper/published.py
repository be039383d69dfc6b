"""What arXiv 2604.11791 and papers that it leans on say, figure by figure; numbers are facts of the models that are named."""

from __future__ import annotations

from dataclasses import dataclass

READ = ""  # in the text of the paper
SUMMARY = "from a summary, not the paper's text"
OUR_READING = "our reading of the text"


@dataclass(frozen=True)
class Published:
    """A figure, table or claim of the paper.

    Args:
        name: such as "Figure 3".
        shows: what is measured, and how.
        models: those of the paper.
        says: what the paper finds on them.
        source: where that was read, if not in the paper's text.
    """

    name: str
    shows: str
    models: str
    says: str
    source: str = READ


MAIN = "Ouro-1.4B, Huginn-0125, Retro-Llama"
OTHERS = "Ouro-2.6B, Retro-OLMo-2, Retro-TinyLlama"
PUBLISHED: dict[str, Published] = {
    "2": Published(
        "Figure 2",
        "Frobenius distance between the attention patterns of all pairs of executed layers, 8 loops",
        MAIN,
        "diagonal bands: a layer resembles itself in other loops most. Ouro settles after the first pass, Huginn and "
        "Retro-Llama right after the prelude",
    ),
    "21": Published("Figure 21", "the same, 32 loops", MAIN, "as figure 2"),
    "23": Published(
        "Figure 23", "distance of attention patterns from those of the last loop", MAIN, "as figure 4, of patterns", OUR_READING
    ),
    "25": Published(
        "Figure 25", "distance of attention patterns from the loop before", MAIN, "as figure 3, of patterns", OUR_READING
    ),
    "4.2": Published(
        "Proposition 4.2",
        "how far a pattern moves, over what the bound B kappa / sqrt(d) |X - X'| allows",
        "attention without positions",
        "at most 1",
    ),
    "3": Published(
        "Figure 3",
        "L2 distance of every layer's state from that in the loop before",
        MAIN,
        "shrinks in all three, in Ouro too",
    ),
    "4": Published(
        "Figure 4",
        "L2 distance from X*, the state after 128 loops",
        MAIN,
        "Huginn and Retro-Llama fall fast to X*; Ouro does not reach it",
    ),
    "22": Published("Figure 22", "cosine to X*", MAIN, "as figure 4", OUR_READING),
    "24": Published("Figure 24", "cosine to the state in the loop before", MAIN, "as figure 3", OUR_READING),
    "19": Published(
        "Figure 19",
        "cosine between the states leaving all pairs of executed layers, 8 and 32 loops",
        "Huginn-0125 among others",
        "Huginn's layers all look alike, with a faint cycle",
    ),
    "5": Published(
        "Figures 5, 26, 27, 28",
        "the last token's states after every layer, in the plane of their first two principal components",
        MAIN,
        "Retro-Llama runs a clean closed cycle; Huginn deviates a little; Ouro more around a roughly constant cycle, and on "
        "“The square root of 16 is” leaves it after loops 8 to 16",
    ),
    "6": Published(
        "Figures 6, 29, 30, 31",
        "six layouts at random initialisation: distance and cosine to X*, degeneracy; 12, 4 and 16 layers, 3 seeds",
        "random weights, 12 layers (also 4 and 16)",
        "with injection all but Ouro's norms converge, to distinct fixed points; without, only pre-norm converges, to one "
        "point that all layers share",
    ),
    "7": Published(
        "Figure 7",
        "ColSum concentration of every pass over the depth in the block",
        "Retro-Llama",
        "the same curve in every loop",
    ),
    "8": Published(
        "Figure 8",
        "sink rate, mixing and matrix entropy of every pass beside a feed-forward model's",
        "Ouro-1.4B beside Llama; retrofits beside the models they were made from",
        "Ouro's block goes through Llama's stages, except that its entropy changes with the loop; retrofits trace their base "
        "models, first and last stage in prelude and coda only",
    ),
    "9": Published("Figure 9", "norm of the residual stream", MAIN, "massive activations are at the first token"),
    "10": Published(
        "Figure 10",
        "stages of models trained from scratch with four loops beside a 12-layer control",
        "(2, 4 x 4, 2), d_model 512, 3.7B tokens, among others",
        "stages appear by themselves; nearest to the control's without injection and with prelude and coda",
    ),
    "11": Published(
        "Figures 11, 12",
        "ColSum and the other measures of every layer over the loops, up to 128",
        "Retro-Llama, Ouro-1.4B",
        "Retro-Llama: constant after a short transient, out to 128; Ouro drifts",
    ),
    "36": Published(
        "Figure 36", "the measures of figures 7 to 9", "Huginn-0125", "no clear stages: its norms cap the residual"
    ),
    "40": Published(
        "Figure 40",
        "the two halves of the block against each other",
        "Ouro-2.6B, upcycled from 24 to 48 layers",
        "each half repeats Llama's stages",
    ),
    "41": Published(
        "Figure 41",
        "the stages with the output of the second layer's MLP set to zero",
        "Retro-Llama, second layer of the prelude",
        "massive activations vanish, and with them the stages",
    ),
    "14": Published(
        "Figure 14",
        "P(a token has a behaviour in any layer, if it has another in any)",
        "Huginn-0125",
        "orbits and sliders never together; both often with fixed",
    ),
    "tables": Published(
        "Limiting behaviour",
        "share of tokens that end at no fixed point, last layer of the loop, 128 loops",
        "Huginn-0125 on all GSM8K test tokens",
        "0.02 % without a system prompt, 0.14 % with a long persona prompt",
    ),
    "tables of others": Published(
        "Limiting behaviour, others",
        "the same",
        "Huginn-0125 over settings; retrofits",
        "0.02 to 2.8 %; 0 % in retrofits",
        SUMMARY,
    ),
    "5.2": Published(
        "Section 5.2",
        "answers after more loops than in training",
        "Ouro-1.4B, accuracy on MMLU after 1 to 8 loops (table 10 of arXiv 2510.25741)",
        "41.21, 60.43, 66.71, 67.45, 66.64, 65.77, 65.28, 64.49",
    ),
}
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fixed_points": ("Cyclic fixed points", ("3", "4", "22", "24", "19")),
    "attention": ("Attention", ("2", "21", "23", "25", "4.2")),
    "paths": ("Paths of the last token", ("5",)),
    "stages": ("Stages of inference", ("7", "8", "9", "36", "40", "11", "10")),
    "massive": ("Without the second MLP", ("41",)),
    "behaviour": ("Tokens that do not settle", ("tables", "tables of others", "14")),
    "init": ("At random initialisation", ("6",)),
    "more": ("More loops than in training", ("5.2",)),
}
