"""The sizes this op is tested and measured at: the oracle's, with other numbers of blocks."""

import dataclasses

from pallas_kernels.oracle_attention import shapes

_NUM_BLOCKS = {"one_token": 2, "one_past_a_block": 2, "one_head": 3}
SHAPES = {name: dataclasses.replace(shape, num_blocks=_NUM_BLOCKS.get(name, shape.num_blocks))
          for name, shape in shapes.SHAPES.items()}
