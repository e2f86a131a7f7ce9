"""`patch(model)`: switch a transformers model that exists already, and switch it back exactly."""

import weakref

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

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
        """Put back every configuration and the cache hook; a second call does nothing."""
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
        self.implementations = []
        model = self._model()
        if model.__dict__.get(_STATE) is self:
            del model.__dict__[_STATE]
            model.__dict__.pop(_HOOK, None)
        _active.discard(self)

    def switch_attention(self) -> None:
        model = self._model()
        configs = _configs(model)
        taken = {id(config) for other in _active for config, _ in other.implementations}
        if any(id(config) in taken for config in configs):
            raise ValueError(
                "model: shares its configuration with a model that is patched already; "
                "restore() that one first"
            )
        self.implementations = [(c, c._attn_implementation_internal) for c in configs]
        model.set_attn_implementation(NAME)
        if not any(config._attn_implementation == NAME for config in configs):
            raise ValueError(
                f"model: {type(model).__name__} does not use transformers' attention interface, "
                "its attention cannot be switched (attention=False patches the rest)"
            )

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
        linear: run its decode-sized linear layers through flat_linear. None: as soon as that has
            landed.
        cache: `generate` makes a `flashinfer_lite.hf.Cache` where it would have made a
            DynamicCache. Caches that the caller passes, and static or quantised ones, are left
            alone.
        calibration: ranges for the unified-max softmax; None for the online softmax.

    Returns:
        A handle with `.restore()`; `with patch(model):` restores at the end. Patching a patched
        model with the same arguments changes nothing and returns a handle on the same patch. A copy
        (deepcopy, pickle) of a patched model is patched: `patch(copy).restore()` restores it.

    Raises:
        TypeError: not a PreTrainedModel.
        ValueError: the model did not take the attention (it is left as it was), is patched already
            with other arguments, or shares its configuration with a patched model.
        NotImplementedError: linear=True or a calibration, which have not landed.

    Example:
        >>> with flashinfer_lite.hf.patch(model):
        ...     tokens = model.generate(**inputs)
    """
    if linear:
        raise NotImplementedError("linear: flat_linear has not landed; leave linear=None")
    if calibration is not None:
        raise NotImplementedError(
            "calibration: the unified-max softmax has not landed; leave calibration=None"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}; patch "
            "the model before it is wrapped or compiled"
        )
    options = {"attention": attention, "cache": cache}
    state = model.__dict__.get(_STATE)
    if state is None:
        state = model.__dict__[_STATE] = _State(model, options)
        try:
            if attention:
                state.switch_attention()
            if cache:
                state.switch_cache()
        except BaseException:
            state.undo()
            raise
    elif state.options != options:
        raise ValueError(
            f"model: already patched with {state.options}, got {options}; restore() it first"
        )
    return Patch(model)


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
