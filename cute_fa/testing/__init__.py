"""What tests of attention need, for this project's tests and for anybody else's: seeded inputs in
awkward layouts, problems drawn at random, and a comparison with an error budget."""

from cute_fa.testing.cases import NAMED_CASES, Case, random_problems
from cute_fa.testing.compare import (
    ErrorReport,
    assert_attention_close,
    assert_bitwise_equal,
    check_attention,
)
from cute_fa.testing.inputs import (
    LAYOUTS,
    TORCH_DTYPES,
    Inputs,
    extreme_inputs,
    index_coded_inputs,
    length_arguments,
    make_inputs,
    normal_inputs,
    one_hot_inputs,
    place,
    quantized_inputs,
)

__all__ = [
    "LAYOUTS",
    "NAMED_CASES",
    "TORCH_DTYPES",
    "Case",
    "ErrorReport",
    "Inputs",
    "assert_attention_close",
    "assert_bitwise_equal",
    "check_attention",
    "extreme_inputs",
    "index_coded_inputs",
    "length_arguments",
    "make_inputs",
    "normal_inputs",
    "one_hot_inputs",
    "place",
    "quantized_inputs",
    "random_problems",
]
