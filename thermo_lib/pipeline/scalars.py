"""The types of single settings: a number is no text, and no truth value either."""

from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from thermo_lib.files.reading import is_number

KINDS = _WHOLE, _NUMBER, _FLAG = "a whole number", "a number", "True or False"


def _whole_of(value: Any) -> Any:
    """8 for 8.0, which is the same to JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


# To pydantic, True and "1" are numbers, and "yes" is True. An error says what is allowed; the field is known later.
def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(_whole_of(value), Integral):
        raise ValueError(_WHOLE)
    return _whole_of(value)


def _number(value: Any) -> Any:
    if not is_number(value):
        raise ValueError(_NUMBER)
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(_FLAG)
    return value


Whole = Annotated[int, BeforeValidator(_whole), Field(le=2**63 - 1)]
Count = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_number)]
Rate = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Flag = Annotated[bool, BeforeValidator(_flag)]
WeightBits = Annotated[Literal[2, 4, 8], BeforeValidator(_whole_of)]
ActivationBits = Annotated[Literal[8, 7, 6, 5, 4, 3, 2], BeforeValidator(_whole_of)]
EmbeddingBits = Annotated[Literal[16, 8], BeforeValidator(_whole_of)]
