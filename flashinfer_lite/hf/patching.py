"""`patch(model)`: switch a transformers model that exists already, and switch it back exactly."""

import weakref

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from flashinfer_lite.hf import calibration as calibrations
from flashinfer_lite.hf import linear as linears
from flashinfer_lite.hf.cache import Cache
from flashinfer_lite.hf.registration import NAME

# Both live in the model's __dict__, so a copy of a patched model is patched and can be restored.
_STATE = "_flashinfer_lite_patch"
_HOOK = "_prepare_cache_for_generation"
_active: "weakref.WeakSet[_State]" = weakref.WeakSet()


class Patch:
    """A handle on a patched model. `restore()` undoes the patch; as a context manager it yields
    the model and restores at the end."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._state = model.__dict__[_STATE]

    def restore(self) -> None:
        """Put back every configuration, class and method; a second call does nothing."""
        self._state.undo()

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, *exc_info) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "active" if self.model.__dict__.get(_STATE) is self._state else "restored"
        return f"Patch({type(self.model).__name__}, {state}, {self._state.options})"


class _State:
    """What was changed. Its reference to the model is weak: the model holds it."""

    def __init__(self, model: PreTrainedModel, options: dict):
        self._model = weakref.ref(model)
        self.options = options
        self.implementations: list = []  # (config, the name it had)
        self.linears: list = []  # modules that were torch.nn.Linear
        self.attentions: list = []  # modules that have a phi
        self.phis: dict[int, list[float]] = {}  # by layer, what they have
        _active.add(self)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _model=weakref.ref(state["_model"]))
        _active.add(self)

    def undo(self) -> None:
        for config, implementation in self.implementations:
            # The property would push the name down into the sub-configs, which had their own.
            config._attn_implementation_internal = implementation
        for module in self.linears:
            linears.swap_back(module)
        for module in self.attentions:
            calibrations.detach(module)
        self.implementations, self.linears, self.attentions = [], [], []
        model = self._model()
        if model.__dict__.get(_STATE) is self:
            del model.__dict__[_STATE]
            model.__dict__.pop(_HOOK, None)
        _active.discard(self)

    def check_same(self, options: dict, phis: dict[int, list[float]]) -> None:
        if self.options != options:
            raise ValueError(
                f"model: already patched with {self.options}, got {options}; restore() it first"
            )
        if self.phis != phis:
            raise ValueError("model: already patched with another calibration; restore() it first")

    def switch_attention(self) -> None:
        model = self._model()
        configs = _configs(model)
        taken = (config for other in _active for config, _ in other.implementations)
        _refuse_shared("its configuration", configs, taken)
        self.implementations = [(c, c._attn_implementation_internal) for c in configs]
        model.set_attn_implementation(NAME)
        if not any(config._attn_implementation == NAME for config in configs):
            raise ValueError(
                f"model: {type(model).__name__} does not use transformers' attention interface, "
                "its attention cannot be switched (attention=False patches the rest)"
            )

    def switch_linear(self, required: bool) -> None:
        modules = list(self._model().modules())
        taken = (module for other in _active for module in other.linears)
        _refuse_shared("linear layers", modules, taken)
        found = [module for module in modules if linears.swappable(module)]
        if required and not any(isinstance(module, linears.FlatLinear) for module in modules):
            if not found:
                raise ValueError(
                    f"linear: expected a model with a plain torch.nn.Linear, got "
                    f"{type(self._model()).__name__}, which has none (quantised and offloaded "
                    "layers and GPT-2's Conv1D stay as they are)"
                )
        self.linears = found
        for module in found:
            linears.swap(module)

    def switch_softmax(self, calibration, phis: dict[int, list[float]]) -> None:
        layers = calibrations.check_fits(self._model(), calibration, phis)
        taken = (module for other in _active for module in other.attentions)
        pairs = [(module, phis[layer]) for layer in layers for module in layers[layer]]
        _refuse_shared("attention layers", (module for module, _ in pairs), taken)
        self.attentions, self.phis = [module for module, _ in pairs], phis
        for module, phi in pairs:
            calibrations.attach(module, phi)

    def switch_cache(self) -> None:
        model = self._model()
        if not hasattr(type(model), "generate"):
            return  # nothing here makes a cache; the model's caller passes one
        if not hasattr(type(model), _HOOK):
            raise NotImplementedError(
                "cache: this version of transformers makes its caches elsewhere; use cache=False "
                "and generate(past_key_values=flashinfer_lite.hf.Cache(config=model.config))"
            )
        model.__dict__[_HOOK] = self.prepare_cache

    def prepare_cache(self, generation_config, model_kwargs, *args, **kwargs):
        """Stands in for the model's method: a DynamicCache that it makes becomes a Cache."""
        model = self._model()
        given = model_kwargs.get("past_key_values")
        method = getattr(type(model), _HOOK)
        result = method(model, generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if made is not given and type(made) is DynamicCache:
            model_kwargs["past_key_values"] = Cache.adopt(made)
        elif made is not given and type(made) is EncoderDecoderCache:
            if type(made.self_attention_cache) is DynamicCache:
                made.self_attention_cache = Cache.adopt(made.self_attention_cache)
        return result


def patch(
    model,
    *,
    attention: bool = True,
    linear: bool | None = None,
    cache: bool = True,
    calibration=None,
) -> Patch:
    """Make a transformers model use this library; weights, state_dict and the class of the model
    are untouched.

    Args:
        model: a `transformers.PreTrainedModel`.
        attention: run its attention through flashinfer_lite (the name "fi_lite").
        linear: run its linear layers through `flat_linear` where the input is decode-sized and no
            gradients are wanted. None is True, but for a model without a torch.nn.Linear.
        cache: `generate` makes a `flashinfer_lite.hf.Cache` where it would have made a
            DynamicCache. Caches that the caller passes, and static or quantised ones, are left
            alone.
        calibration: a `flashinfer_lite.calibrate.Calibration` of this model, or the path of a saved
            one: attention layers that it gives a phi use the unified-max softmax. None for the
            online softmax everywhere.

    Returns:
        A handle with `.restore()`; `with patch(model):` restores at the end. Patching a patched
        model with the same arguments changes nothing and returns a handle on the same patch. A copy
        (deepcopy, pickle) of a patched model is patched: `patch(copy).restore()` restores it.

    Raises:
        TypeError: not a PreTrainedModel, not a bool, or no calibration.
        ValueError: the model did not take the attention; linear=True and it has no torch.nn.Linear;
            the calibration is of another model, or comes with attention=False; the model is patched
            already with other arguments, or shares its configuration or layers with a patched
            model. It is left as it was.

    Example:
        >>> with flashinfer_lite.hf.patch(model):
        ...     tokens = model.generate(**inputs)
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}; patch "
            "the model before it is wrapped or compiled"
        )
    for name, given in (("attention", attention), ("linear", linear), ("cache", cache)):
        if not isinstance(given, bool) and (name, given) != ("linear", None):
            raise TypeError(f"{name}: expected a bool, got {given!r}")
    phis = {}
    if calibration is not None:
        if not attention:
            raise ValueError("calibration: expected attention=True with it, got attention=False")
        calibration = calibrations.load(calibration)
        phis = calibrations.phis_by_layer(calibration)
    options = {
        "attention": attention,
        "linear": linear is None or linear,
        "cache": cache,
        "calibration": calibration is not None,
    }
    state = model.__dict__.get(_STATE)
    if state is not None:
        state.check_same(options, phis)
        return Patch(model)
    state = model.__dict__[_STATE] = _State(model, options)
    try:
        if attention:
            state.switch_attention()
        if calibration is not None:
            state.switch_softmax(calibration, phis)
        if options["linear"]:
            state.switch_linear(required=linear is not None)
        if cache:
            state.switch_cache()
    except BaseException:
        state.undo()
        raise
    return Patch(model)


def _refuse_shared(what: str, ours, taken) -> None:
    """Two patches of one object could not be undone in any order."""
    taken = {id(one) for one in taken}
    if any(id(one) in taken for one in ours):
        raise ValueError(
            f"model: shares {what} with a model that is patched already; restore() that one first"
        )


def _configs(model: PreTrainedModel) -> list:
    """Every configuration object that `set_attn_implementation` may write to, each once."""
    found = {}
    queue = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while queue:
        config = queue.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            queue += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
