"""Makes PyPI's petals 2.2.0.post1 import and run on today's hivemind, transformers and peft. Nothing else
patches anything.

`install_import_hook()` (called when textrl_swarm is imported) only puts a finder on `sys.meta_path`: nothing
happens until somebody imports petals. Then the names petals expects are put back first, and petals' own
classes are mended right after it loaded. Each mend checks that what it replaces is still there and says what
changed when it is not.

Knows nothing about LoRA, policies or training.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import logging
import os
import sys
from types import ModuleType

from textrl_swarm.errors import IncompatibleLibrary, PetalsMissing
from textrl_swarm.swarm.sockets import socket_directory

TESTED = {
    "petals": "2.2.0.post1",
    "hivemind": "1.1.12",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "torch": "2.13.0",
}
INSTALL_COMMAND = (
    "pip install 'textrl-swarm[swarm]' && pip install --no-deps petals==2.2.0.post1   "
    "(in a clone: make setup)"
)

# hivemind 1.1.12 stopped re-exporting these (its PR 663); petals still imports them from the package root
_HIVEMIND_NAMES = {
    **dict.fromkeys(("BatchTensorDescriptor", "TensorDescriptor"), "hivemind.utils.tensor_descr"),
    "get_dht_time": "hivemind.utils.timed_storage",
    "MAX_DHT_TIME_DISCREPANCY_SECONDS": "hivemind.utils.timed_storage",
    "TimedStorage": "hivemind.utils.timed_storage",
    "serialize_torch_tensor": "hivemind.compression",
    "deserialize_torch_tensor": "hivemind.compression",
    "deserialize_tensor_stream": "hivemind.compression",
    **dict.fromkeys(("nested_flatten", "nested_pack", "nested_compare"), "hivemind.utils.nested"),
    **dict.fromkeys(("P2P", "P2PContext", "PeerID"), "hivemind.p2p"),
    "MSGPackSerializer": "hivemind.utils.serializer",
    "get_logger": "hivemind.utils.logging",
    "anext": "hivemind.utils.asyncio",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _changed(package: str, what: str) -> IncompatibleLibrary:
    return IncompatibleLibrary(
        f"{package} {_version(package)} {what}; textrl_swarm was tested with {package} "
        f"{TESTED[package]}: "
        f"pip install '{package}=={TESTED[package]}'"
    )


def _need(package: str, module: ModuleType | type, name: str) -> object:
    """The attribute that a mend relies on, or an error that names it."""
    try:
        return getattr(module, name)
    except AttributeError:
        raise _changed(package, f"has no {module.__name__}.{name} any more") from None


# ----------------------------------------------------------------------------------- the import hook


class _MendingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def __getattr__(self, name: str):  # resource readers and the like stay those of the real loader
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        _before_petals()
        from hivemind.utils.logging import HandlerMode, use_hivemind_log_handler

        root_level = logging.root.level
        with _environment(PETALS_IGNORE_DEPENDENCY_VERSION="1", PETALS_LOGGING="False"), explained_changes():
            self._loader.exec_module(module)
            # This module puts a handler on the root logger, whatever PETALS_LOGGING says.
            importlib.import_module("petals.utils.convert_block")
        if "PETALS_LOGGING" not in os.environ:  # the root logger and its level belong to the application
            use_hivemind_log_handler(HandlerMode.IN_HIVEMIND)
            logging.root.setLevel(root_level)
        _after_petals()


class _PetalsFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None):
        if fullname == "petals.utils.peft":
            _before_petals_peft()
        if fullname != "petals":
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _MendingLoader(spec.loader)  # type: ignore[arg-type]
                return spec
        return None


def install_import_hook() -> None:
    """Lets `import petals` work from now on; does nothing visible until then. Safe to call twice."""
    if not any(isinstance(finder, _PetalsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PetalsFinder())


def lend_tokenizer_name() -> None:
    """`from transformers import BloomTokenizerFast`, as petals' and TextRL's examples have it: transformers 5
    dropped the name alone.
    """
    import transformers

    if not hasattr(transformers, "BloomTokenizerFast"):
        transformers.BloomTokenizerFast = transformers.PreTrainedTokenizerFast


@contextlib.contextmanager
def _environment(**variables: str):
    """Environment variables for the time of one import; the user's own values win and everything is put
    back.
    """
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def explained_changes():
    """Turns "cannot import name X from Y" into an error that says which version of Y still had it."""
    try:
        yield
    except IncompatibleLibrary:
        raise
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package in TESTED and _version(package) != "missing":
            raise _changed(package, f"changed: {error}") from error
        raise


def check_installed() -> None:
    """Raises PetalsMissing, with the command to type, when petals or hivemind is not there. Imports
    nothing.
    """
    for name in ("petals", "hivemind"):
        if importlib.util.find_spec(name) is None:
            raise PetalsMissing(
                f"the swarm parts need {name}, which is not installed; type: {INSTALL_COMMAND}"
            )


def require_petals() -> ModuleType:
    """Imports petals, mended.

    Raises:
        PetalsMissing: petals or a library it needs is not installed; the message has the command to type.
        IncompatibleLibrary: an installed library changed something that is relied on.
    """
    install_import_hook()
    try:
        return importlib.import_module("petals")
    except ModuleNotFoundError as error:
        raise PetalsMissing(
            f"the swarm parts need {error.name}, which is not installed; type: {INSTALL_COMMAND}"
        ) from error


# --------------------------------------------------------------------------- before petals is loaded


def _before_petals() -> None:
    if _version("petals") != TESTED["petals"]:
        raise _changed("petals", "is not the release that the mends were written for")
    import hivemind
    import transformers.utils
    from hivemind.p2p import P2P

    for name, module in _HIVEMIND_NAMES.items():
        _need("hivemind", importlib.import_module(module), name)

    def find_moved_name(name: str):  # PEP 562: asked only for names that hivemind itself does not have
        if name in _HIVEMIND_NAMES:
            return getattr(importlib.import_module(_HIVEMIND_NAMES[name]), name)
        raise AttributeError(f"module 'hivemind' has no attribute {name!r}")

    hivemind.__getattr__ = find_moved_name
    _need("hivemind", P2P, "_UNIX_SOCKET_PREFIX")
    P2P._UNIX_SOCKET_PREFIX = f"/unix{socket_directory()}/"
    if not hasattr(transformers.utils, "get_file_from_repo"):
        transformers.utils.get_file_from_repo = _get_file_from_repo


def _before_petals_peft() -> None:
    import peft.utils

    if not hasattr(peft.utils, "COMMON_LAYERS_PATTERN"):
        peft.utils.COMMON_LAYERS_PATTERN = ["layers", "h", "block", "blocks", "layer"]


def _get_file_from_repo(path_or_repo: str, filename: str, use_auth_token=None, **kwargs) -> str | None:
    """What transformers 4 had: a file of a directory or of the hub, None when it does not exist.

    Petals' servers keep downloads in a cache of their own; what transformers has downloaded before is used as
    well.
    """
    from transformers.utils.hub import cached_file

    options = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    options = {f"_raise_exceptions_for_{name}": value for name, value in options.items()}
    options["token"] = kwargs.pop("token", None) or use_auth_token
    found = cached_file(path_or_repo, filename, **options, **kwargs)
    if found is None and kwargs.pop("cache_dir", None) is not None:
        found = cached_file(path_or_repo, filename, **options, **{**kwargs, "local_files_only": True})
    return found


# ---------------------------------------------------------------------------- after petals is loaded


def _after_petals() -> None:
    import petals.client.inference_session as inference_session
    import petals.client.lm_head as lm_head
    import petals.client.remote_generation as remote_generation
    import petals.client.remote_sequential as remote_sequential
    import petals.models.bloom.config as bloom_config
    import petals.models.bloom.model as bloom_model
    import petals.utils.auto_config as auto_config
    import petals.utils.version as version

    lm_head.LMHead.__init__ = _lm_head_init
    remote_sequential.RemoteSequential.__init__ = _outside_meta_device(
        remote_sequential.RemoteSequential.__init__
    )
    _read_both_key_styles(bloom_model)
    _close_once(inference_session._ServerInferenceSession)
    _mend_generation(remote_generation)
    auto_config._AutoDistributedBase.from_pretrained = _accept_token(
        auto_config._AutoDistributedBase.from_pretrained
    )
    bloom_config.DistributedBloomConfig.from_pretrained = _accept_token(
        bloom_config.DistributedBloomConfig.from_pretrained
    )
    version.validate_version = lambda: None  # an HTTP request without a time limit


def use_server_classes(
    *,
    server: type,
    backend: type,
    handler: type,
    container: type,
    task_pool: type,
    start_node,
    read_config,
    load_block,
    convert_block,
    measure_speed,
) -> None:
    """Petals' command line and Server build their parts from module globals; ours take their places.

    Args:
        server, backend, handler, container, task_pool: subclasses of the stock ones.
        start_node: in the place of hivemind's DHT.
        read_config: name of a model -> the configuration of its decoder.
        load_block, convert_block, measure_speed: in the places of petals' `load_pretrained_block`,
            `convert_block` and `measure_compute_rps`.
    """
    require_petals()
    import petals.cli.run_server as run_server
    import petals.server.backend as backend_module
    import petals.server.server as server_module
    import petals.server.throughput as throughput

    class AnyConfig:
        from_pretrained = staticmethod(read_config)

    replacements = {
        server_module: {
            "AutoDistributedConfig": AnyConfig,
            "DHT": start_node,
            "TransformerBackend": backend,
            "TransformerConnectionHandler": handler,
            "load_pretrained_block": load_block,
            "convert_block": convert_block,
            "ModuleContainer": container,
        },
        backend_module: {"PrioritizedTaskPool": task_pool},
        throughput: {"measure_compute_rps": measure_speed},
        run_server: {"Server": server, "validate_version": lambda: None},
    }
    for module, names in replacements.items():
        for name, replacement in names.items():
            _need("petals", module, name)
            setattr(module, name, replacement)


def _lm_head_init(self, config) -> None:
    """petals' LMHead with a weight that transformers 5 can tie, and without cpufeature (which has no
    wheels).
    """
    import torch
    from torch import nn

    nn.Module.__init__(self)
    device = torch.device("meta") if config.tie_word_embeddings else None  # a place-holder until it is tied
    self.weight = nn.Parameter(
        torch.zeros(config.vocab_size, config.hidden_size, device=device), requires_grad=False
    )
    self.bias = None
    self.in_features, self.out_features = config.hidden_size, config.vocab_size
    self.use_chunked_forward = config.use_chunked_forward
    if self.use_chunked_forward == "auto":  # petals' rule: bf16 is slow on CPUs without AVX512
        self.use_chunked_forward = "AVX512" not in torch.backends.cpu.get_cpu_capability()
    self.chunked_forward_step = config.chunked_forward_step
    self._bf16_warning_shown = False


def _outside_meta_device(init):
    """transformers 5 builds models under the meta device, where hivemind's shared memory cannot live."""

    def __init__(self, *args, **kwargs):
        import torch

        with torch.device("cpu"):
            init(self, *args, **kwargs)

    return __init__


def _close_once(session: type) -> None:
    """Closes a session only once.

    A session whose closing failed would try again while the interpreter ends, when no event loop is left, and
    hang.
    """
    close = _need("petals", session, "close")

    def close_once(self) -> None:
        try:
            close(self)
        finally:
            self._outputs_stream, self.closed = None, True

    session.close = close_once


def _read_both_key_styles(bloom_model: ModuleType) -> None:
    for cls in (
        bloom_model.DistributedBloomModel,
        bloom_model.DistributedBloomForCausalLM,
        bloom_model.DistributedBloomForSequenceClassification,
    ):
        cls._keys_to_ignore_on_load_unexpected = [r"^(transformer\.)?h\."]


def _mend_generation(remote_generation: ModuleType) -> None:
    """Makes generate() of transformers 5 keep no cache (servers hold it) and send only what the session has
    not seen.
    """
    mixin = _need("petals", remote_generation, "RemoteGenerationMixin")
    past_key_values = _need("petals", remote_generation, "RemotePastKeyValues")
    generation = importlib.import_module("transformers.generation.utils").GenerationMixin
    for name in ("_prepare_cache_for_generation", "prepare_inputs_for_generation"):
        _need("transformers", generation, name)

    def prepare_inputs_for_generation(self, input_ids, **kwargs) -> dict:
        prefix = self.config.pre_seq_len if self.config.tuning_mode else 0  # trainable prompts, not tokens
        seen = max(0, self.transformer.h.position - prefix)
        return {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values()}

    mixin.prepare_inputs_for_generation = prepare_inputs_for_generation
    mixin._prepare_cache_for_generation = lambda self, *args, **kwargs: None


def _accept_token(from_pretrained):
    """transformers 5 ignores `use_auth_token`, which petals still passes; `token` is its name now."""
    function = from_pretrained.__func__

    def mended(cls, *args, use_auth_token=None, **kwargs):
        if use_auth_token is not None:
            kwargs.setdefault("token", use_auth_token)
        return function(cls, *args, **kwargs)

    return classmethod(mended)  # type: ignore[arg-type]
