"""Products with inputs of 8 bits, where weights are whole numbers: what integer instructions multiply.

Most of what a product costs on a CPU is looking values up; integers are multiplied four at a time. Inputs of each
token are rounded by themselves, some 32 at a time with a scale of their own, as llama.cpp does. The network is
then another one than the file's, by little, and only where that is asked for.
"""

from torch import nn

from sqs_pyro.kernels.modules import PackedLinear
from sqs_pyro.kernels.native import has_native_kernel
from sqs_pyro.packing.coded import CodedTensor

#: Inputs that are rounded together, by bits of a code: as many as some words of codes have.
_BLOCKS = {2: 32, 3: 30, 4: 32}


def round_inputs(net: nn.Module, on: bool = True) -> list[str]:
    """Let linear layers round their inputs to 8 bits, or no longer.

    It takes weights of whole numbers times one step and scales of outputs (``grid: uniform``, no ``group_size``),
    in codes of 2 to 4 bits, on a CPU with compiled kernels; all other layers multiply as before.

    Args:
        net: a packed network, changed in place.
        on: whether inputs are rounded.

    Returns:
        Paths of the layers that round their inputs now.
    """
    found = []
    for path, module in net.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        weight = module.packed_weight
        block = _BLOCKS.get(weight.args.bits, 0) if on and weight.args.form == "tiled" else 0
        if block and not (_fits(weight.coded(), weight.args.bits) and has_native_kernel("linear_int8_tiled")):
            block = 0
        module.int8_block = block
        if block:
            found.append(path)
    return found


def _fits(coded: CodedTensor, bits: int) -> bool:
    """Return whether all codewords are whole numbers of so many bits, whose sums thus fit into 16."""
    whole = coded.whole_numbers()
    if whole is None or coded.num_groups > 1:
        return False
    most = 2 ** (bits - 1)
    return bool(whole[0].min() >= -most) and bool(whole[0].max() < most)
