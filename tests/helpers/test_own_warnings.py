"""A deprecated call of our own code is an error in tests; one inside a library is not."""

import types
import warnings

import optax
import pytest

from dantinox.training import train_step


def function(module: str, source: str, **names):
    """The function `f` of a module of this name."""
    made = types.ModuleType(module)
    vars(made).update(names)
    exec(source, vars(made))
    return made.f


LEVELS = (1, 2)


@pytest.mark.parametrize("stacklevel", LEVELS)
@pytest.mark.parametrize("module", ["dantinox.model.new", "bench.new", "kernels.ops.new", "reference.new", "tests.new"])
def test_deprecated_call_of_ours_raises(module, stacklevel):
    warn = f"import warnings\ndef f(): warnings.warn('f is old', DeprecationWarning, stacklevel={stacklevel})"
    library = function("library._src.old", warn)
    call = function(module, "def f(): g()", g=library)
    with pytest.raises(DeprecationWarning, match="f is old"):
        call()


@pytest.mark.parametrize("stacklevel", LEVELS)
def test_deprecated_call_of_a_library_is_ignored(stacklevel):
    warn = f"import warnings\ndef f(): warnings.warn('f is old', DeprecationWarning, stacklevel={stacklevel})"
    library = function("library._src.old", warn)
    other = function("other", "def f(): g()", g=library)
    call = function("dantinox.model.new", "def f(): g()", g=other)
    call()


def test_optax_global_norm_is_an_error_again():
    """optax.global_norm warns in the name of optax, which hid our call of it."""
    with pytest.raises(DeprecationWarning, match=r"optax\.global_norm is deprecated"):
        function("dantinox.new", "def f(x): return norm(x)", norm=optax.global_norm)({})
    assert "global_norm(grads)" not in train_step.__loader__.get_source(train_step.__name__)


def test_other_warnings_keep_their_place():
    with pytest.warns(UserWarning, match="plain") as seen:
        function("library", "import warnings\ndef f(): warnings.warn('plain', stacklevel=2)")()
    assert seen[0].filename == __file__
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function("dantinox.x", "import warnings\ndef f(): warnings.warn('ours', DeprecationWarning, stacklevel=2)")()
    assert seen[0].filename == __file__  # a deprecation that our own code announces goes to its caller
