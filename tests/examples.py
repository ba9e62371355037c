"""Laws tried on made-up examples: on some in the default suite, on many in the slow one."""

import pytest
from hypothesis import given, settings


def examples(few, many, **strategies):
    """`given`, once for `few` examples, once slow for `many`."""

    def tried(law):
        @pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(count):
            settings(max_examples=count, deadline=None)(given(**strategies)(law))()

        test.__name__, test.__doc__ = law.__name__, law.__doc__
        return test

    return tried
