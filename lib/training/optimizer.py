"""Makes the optimizer, with its learning rate schedule, that every training here uses.

optimizer = make_optimizer(learning_rate=1e-3, steps=800, warmup_steps=80)
"""

from __future__ import annotations

import keras


def make_optimizer(
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    clip_norm: float | None = 1.0,
    ema_momentum: float | None = None,
) -> keras.optimizers.Adam:
    """Make Adam with linear warmup and cosine decay to 0 (Loshchilov and Hutter, SGDR, 2017).

    Args:
        learning_rate: at the end of the warmup, its highest.
        steps: of the whole training, warmup included.
        warmup_steps: steps in which the learning rate rises from 0.
        clip_norm: limit of the gradients' global norm (Pascanu et al., "On the difficulty of
            training recurrent neural networks", 2013); None: no clipping.
        ema_momentum: of a moving average of the weights (Polyak and Juditsky, 1992); None: none.
    """
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps - warmup_steps, 1),
    )
    average = {} if ema_momentum is None else {"use_ema": True, "ema_momentum": ema_momentum}
    # beta_2 averages over some 100 steps. Adam's default of 1,000 is too long for short trainings.
    return keras.optimizers.Adam(schedule, beta_2=0.99, global_clipnorm=clip_norm, **average)
