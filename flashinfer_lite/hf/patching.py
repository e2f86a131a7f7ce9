"""`patch(model)`: switch a transformers model that exists already, and switch it back exactly."""

import weakref

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from flashinfer_lite.hf.cache import Cache
from flashinfer_lite.hf.registration import NAME

# Both live in the model's __dict__, so a copy of a patched model has a handle of its own.
_HANDLE = "_flashinfer_lite_patch"
_HOOK = "_prepare_cache_for_generation"
_patches: "weakref.WeakSet[Patch]" = weakref.WeakSet()


class Patch:
    """What `patch` did to one model. `restore()` undoes it; also a context manager that yields the
    model."""

    def __init__(self, model: PreTrainedModel, options: dict):
        self._model = weakref.ref(model)
        self._options = options
        self._implementations: list = []  # (config, the name it had)
        _patches.add(self)

    def restore(self) -> None:
        """Put back every configuration and the cache hook; a second call does nothing."""
        for config, implementation in self._implementations:
            # The property would push the name down into the sub-configs, which had their own.
            config._attn_implementation_internal = implementation
        self._implementations = []
        model = self._model()
        if model is not None and model.__dict__.get(_HANDLE) is self:
            del model.__dict__[_HANDLE]
            model.__dict__.pop(_HOOK, None)
        _patches.discard(self)

    def __enter__(self) -> PreTrainedModel:
        return self._model()

    def __exit__(self, *exc_info) -> None:
        self.restore()

    def __repr__(self) -> str:
        model = self._model()
        state = (
            "active" if model is not None and model.__dict__.get(_HANDLE) is self else "restored"
        )
        return f"Patch({type(model).__name__}, {state}, {self._options})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _model=weakref.ref(state["_model"]))
        _patches.add(self)

    def _switch_attention(self) -> None:
        model = self._model()
        configs = _configs(model)
        for other in _patches:
            if other is not self and any(
                config is theirs for config in configs for theirs, _ in other._implementations
            ):
                raise ValueError(
                    "model: shares its configuration with a model that is patched already; "
                    "restore() that one first"
                )
        self._implementations = [
            (config, config._attn_implementation_internal) for config in configs
        ]
        model.set_attn_implementation(NAME)
        if not any(config._attn_implementation == NAME for config in configs):
            raise ValueError(
                f"model: {type(model).__name__} does not use transformers' attention interface, "
                "its attention cannot be switched (attention=False patches the rest)"
            )

    def _switch_cache(self) -> None:
        model = self._model()
        if not hasattr(type(model), "generate"):
            return  # nothing here makes a cache; the model's caller passes one
        if not hasattr(type(model), _HOOK):
            raise NotImplementedError(
                "cache: this version of transformers makes its caches elsewhere; use cache=False "
                "and generate(past_key_values=flashinfer_lite.hf.Cache(config=model.config))"
            )
        model.__dict__[_HOOK] = self._prepare_cache

    def _prepare_cache(self, generation_config, model_kwargs, *args, **kwargs):
        """Stands in for the model's method: a DynamicCache that it makes becomes a Cache."""
        model = self._model()
        given = model_kwargs.get("past_key_values")
        result = getattr(type(model), _HOOK)(
            model, generation_config, model_kwargs, *args, **kwargs
        )
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
        model with the same arguments returns its handle. A copy (deepcopy, pickle) of a patched
        model is patched: `patch(copy)` returns the handle that restores it.

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
    handle = model.__dict__.get(_HANDLE)
    if handle is not None:
        if handle._options != options:
            raise ValueError(
                f"model: already patched with {handle._options}, got {options}; restore() it first"
            )
        return handle
    handle = Patch(model, options)
    model.__dict__[_HANDLE] = handle
    try:
        if attention:
            handle._switch_attention()
        if cache:
            handle._switch_cache()
    except BaseException:
        handle.restore()
        raise
    return handle


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
