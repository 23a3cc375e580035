"""Small models with the structure of popular ones, with tables by hand: `MODELS`, by name."""

from zoo import equinox_transformer, functions, gemma, gpt2, lm1b, lstm, moe, nnx_gemma, t5, vision

LINEN = {
    **gemma.MODELS,
    **lm1b.MODELS,
    **t5.MODELS,
    **moe.MODELS,
    **lstm.MODELS,
    **vision.MODELS,
    **gpt2.MODELS,
}
MODELS = {**LINEN, **nnx_gemma.MODELS, **equinox_transformer.MODELS, **functions.MODELS}
