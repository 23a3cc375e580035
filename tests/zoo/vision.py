"""Vision models in Linen: a transformer, one on latents with a convolutional head, a ResNet."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.entry import Along, Built, Model, floats, in_layers, linen, random_like

WIDTH, HEADS, HIDDEN, CLASSES, LAYERS = 16, 4, 24, 8, 2


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(x)))


class Block(nn.Module):
    """A block with norms first, as in Google's vision transformer."""

    @nn.compact
    def __call__(self, x, _=None):
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, deterministic=True)(normed, normed)
        return x + Mlp(name="MlpBlock_0")(nn.LayerNorm()(x)), None


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        token = self.param("cls", nn.initializers.zeros_init(), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        block = nn.remat(Block, prevent_cse=False)
        x, _ = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )(name="encoderblock")(x, None)
        x = nn.LayerNorm(name="encoder_norm")(x)[:, 0]
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(WIDTH, name="pre_logits")(x)))


class LatentVit(nn.Module):
    """Patches of a latent image of four channels; the head is a 1x1 convolution over patches."""

    @nn.compact
    def __call__(self, latents):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2), padding="VALID", name="embedding")(latents)
        grid = x.shape
        x = x.reshape(grid[0], -1, WIDTH)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(LAYERS):
            x, _ = Block(name=f"encoderblock_{i}")(x)
        return nn.Conv(CLASSES, (1, 1), name="head")(
            nn.LayerNorm(name="encoder_norm")(x).reshape(grid)
        )


class Bottleneck(nn.Module):
    """Three convolutions with batch norm, and a 1x1 convolution as shortcut if shapes differ."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        strides = (self.stride, self.stride)
        y = nn.relu(norm()(nn.Conv(self.features, (1, 1), use_bias=False)(x)))
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), strides, use_bias=False)(y)))
        y = norm()(nn.Conv(self.features * 2, (1, 1), use_bias=False)(y))
        if y.shape != x.shape:
            projected = nn.Conv(
                self.features * 2, (1, 1), strides, use_bias=False, name="conv_proj"
            )(x)
            x = nn.BatchNorm(use_running_average=not train, name="norm_proj")(projected)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv_init")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_init")(x))
        x = Bottleneck(8, stride=2)(x, train)
        x = Bottleneck(8)(x, train)
        return nn.Dense(CLASSES, name="head")(x.mean(axis=(1, 2)))


def resnet():
    module, images = ResNet(), floats(2, 8, 8, 3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    statistics = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes["batch_stats"])

    def fn(params, statistics, images):
        return module.apply({"params": params, "batch_stats": statistics}, images)

    return Built(fn, random_like(shapes["params"]), (statistics, images), module, (images,))


ATTENTION = "MultiHeadDotProductAttention_0"
CONV = Along(-2, summed=(-4, -3, -2))

MODELS = {
    "ViT, scan of remat": Model(
        lambda: linen(Vit(), floats(2, 8, 8, 3)),
        {
            # patches of three channels cannot be grouped in fours
            f"encoderblock/{ATTENTION}/query/kernel": Along(-3, stack=(-4,)),
            f"encoderblock/{ATTENTION}/key/kernel": Along(-3, stack=(-4,)),
            f"encoderblock/{ATTENTION}/value/kernel": Along(-3, stack=(-4,)),
            f"encoderblock/{ATTENTION}/out/kernel": Along(-2, stack=(-4,), summed=(-3, -2)),
            "encoderblock/MlpBlock_0/Dense_0/kernel": Along(-2, stack=(-3,)),
            "encoderblock/MlpBlock_0/Dense_1/kernel": Along(-2, stack=(-3,)),
            "pre_logits/kernel": Along(-2),
            "head/kernel": Along(-2),
        },
        products=6 + 2,
    ),
    "ViT over latents, convolutional head": Model(
        lambda: linen(LatentVit(), floats(2, 4, 6, 4)),
        {
            "embedding/kernel": CONV,
            **in_layers(
                "encoderblock_{}",
                {
                    f"{ATTENTION}/query/kernel": Along(-3),
                    f"{ATTENTION}/key/kernel": Along(-3),
                    f"{ATTENTION}/value/kernel": Along(-3),
                    f"{ATTENTION}/out/kernel": Along(-2, summed=(-3, -2)),
                    "MlpBlock_0/Dense_0/kernel": Along(-2),
                    "MlpBlock_0/Dense_1/kernel": Along(-2),
                },
            ),
            "head/kernel": CONV,
        },
        products=2 * 6 + 2,
    ),
    "ResNet": Model(
        resnet,
        {
            "Bottleneck_0/Conv_0/kernel": CONV,
            "Bottleneck_0/Conv_1/kernel": CONV,
            "Bottleneck_0/Conv_2/kernel": CONV,
            "Bottleneck_0/conv_proj/kernel": CONV,
            "Bottleneck_1/Conv_0/kernel": CONV,
            "Bottleneck_1/Conv_1/kernel": CONV,
            "Bottleneck_1/Conv_2/kernel": CONV,
            "head/kernel": Along(-2),
        },
        # 1x1 convolutions are matrix products, also with a stride
        products=6,
        decompressed=frozenset({"Bottleneck_0/Conv_1/kernel", "Bottleneck_1/Conv_1/kernel"}),
    ),
}
