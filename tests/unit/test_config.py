"""The configuration: what is refused, which field the error names and how it helps."""

import copy
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from app.config import parse
from app.engines.owned_args import OWNED_ARGS
from app.errors import ConfigError
from app.messages import Role
from tests.conftest import REPOSITORY

REMOVED = object()
MINIMAL: dict[str, Any] = {
    "models": [{"name": "tiny", "source": "baton:tiny", "prefill": {}, "decode": {}}],
    "transfer": {},
}
MODEL = MINIMAL["models"][0]
ALONE: dict[str, Any] = {"name": "tiny", "source": "baton:tiny", "decode": {}}


def named(name: str) -> dict[str, Any]:
    return {**MODEL, "name": name}


def changed(path: str, value: Any) -> dict[str, Any]:
    """MINIMAL with what lies at `path` replaced, added or, for REMOVED, gone."""
    args = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    section: Any = args
    for name in parents:
        section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
    if value is REMOVED:
        del section[last]
    else:
        section[last] = value
    return args


def test_the_default_application_is_valid_and_disaggregated() -> None:
    document = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    for application in document["applications"]:
        assert all(model.is_disaggregated for model in parse(application["args"]).models)


def test_a_minimal_configuration_is_valid() -> None:
    assert parse(MINIMAL).models[0].is_disaggregated


def test_any_number_of_models_with_engines_of_their_own_is_valid() -> None:
    engines: list[dict[str, Any]] = [{"engine": engine} for engine in ("vllm", "sglang", "sim")]
    models = [{"name": f"org/{pool['engine']}", "source": "baton:tiny", "decode": pool} for pool in engines]
    parsed = parse({"models": models}).models
    assert [model.engine for model in parsed] == ["vllm", "sglang", "sim"]
    assert [model.deployment_name("decode") for model in parsed] == [
        "decode-org-vllm",
        "decode-org-sglang",
        "decode-org-sim",
    ]


def test_an_aggregated_pool_beside_the_other_two_is_valid() -> None:
    model = parse(changed("models.0.aggregated", {"replicas": 2})).models[0]
    assert model.is_disaggregated
    assert [model.pool(role) for role in get_args(Role)] == [model.prefill, model.decode, model.aggregated]
    assert model.deployment_name("aggregated") == "aggregated-tiny"


@pytest.mark.parametrize(
    ("engine", "whole"),
    [
        ("vllm", {"prefill", "decode", "aggregated"}),
        ("sim", {"prefill", "decode", "aggregated"}),
        ("sglang", {"aggregated"}),
    ],
)
def test_which_pools_can_run_whole_sequences_depends_on_the_engine(engine: str, whole: set[str]) -> None:
    pool = {"engine": engine}
    model = parse({**MINIMAL, "models": [{**MODEL, "prefill": pool, "decode": pool, "aggregated": pool}]}).models[0]
    assert {role for role in get_args(Role) if model.runs_whole_sequences(role)} == whole
    assert model.can_prefill_decode is model.can_decode_prefill is ("decode" in whole)
    alone = parse({"models": [{"name": "m", "source": "baton:tiny", "decode": pool}]}).models[0]
    assert alone.runs_whole_sequences("decode")


@pytest.mark.parametrize("policy", ["predicted", "thresholds", "remote"])
def test_each_placement_policy_can_be_named_alone(policy: str) -> None:
    placement = {"policy": policy}
    model = parse(changed("models.0.routing.placement", placement)).models[0]
    assert model.routing.placement.policy == policy
    assert parse(MINIMAL).models[0].routing.placement.policy == "predicted"


def test_transfer_is_missing_if_any_model_has_a_prefill_pool() -> None:
    aggregated = {"name": "other", "source": "baton:tiny", "decode": {}}
    with pytest.raises(ConfigError, match=r"models\.1\.prefill is set") as caught:
        parse({"models": [aggregated, MODEL]})
    assert caught.value.field == "transfer"


@pytest.mark.parametrize("rate", [0, 1])
def test_sglang_compares_all_kv_or_none(rate: int) -> None:
    pool = {"engine": "sglang"}
    model = {**MODEL, "prefill": pool, "decode": pool}
    assert parse({"models": [model], "transfer": {"checksum_rate": rate}})
    with pytest.raises(ConfigError, match=r"models\.0.*set 1 or 0") as caught:
        parse({"models": [model], "transfer": {"checksum_rate": 0.01}})
    assert caught.value.field == "transfer"


def test_of_vllms_handoffs_any_part_may_be_compared() -> None:
    transfer = parse(changed("transfer.checksum_rate", 0.01)).transfer
    assert transfer is not None
    assert transfer.checksum_rate == 0.01


def test_without_a_prefill_pool_no_transfer_section_is_needed() -> None:
    args = changed("models.0.prefill", REMOVED)
    del args["transfer"]
    assert not parse(args).models[0].is_disaggregated


@pytest.mark.parametrize(
    "path",
    [
        "model",
        "models.0.quantization",
        "models.0.decode.replica",
        "models.0.prefill.resources.cpus",
        "transfer.backend",
        "frontend.engine_args",
        "limits.ttft_timeout",
    ],
)
def test_an_unknown_key_is_refused_by_its_path(path: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        parse(changed(path, 1))
    assert caught.value.field == path


@pytest.mark.parametrize(
    ("path", "value", "field", "words"),
    [
        # numbers that cannot work
        ("models.0.decode.replicas", 0, None, "greater than or equal to 1, got 0"),
        ("models.0.prefill.tensor_parallel_size", 0, None, "got 0"),
        ("models.0.decode.resources.num_cpus", -1, None, "got -1"),
        ("transfer.lease_s", 11, None, "greater than or equal to 12, got 11"),
        ("transfer.port_min", 80, None, "got 80"),
        ("transfer.port_max", 65536, None, "got 65536"),
        ("limits.ttft_timeout_s", 0, None, "greater than 0, got 0"),
        ("limits.max_ttft_ms", 0, None, "greater than 0, got 0"),
        ("limits.max_attempts", 0, None, "got 0"),
        # wrong types
        ("models", "tiny", None, "list"),
        ("models.0.decode", "yes", None, "dictionary"),
        ("models.0.decode.replicas", "two", None, "got 'two'"),
        ("models.0.decode.environment", {"OMP_NUM_THREADS": 4}, "models.0.decode.environment.OMP_NUM_THREADS", "got 4"),
        ("models.0.engine_args", ["max_model_len=4096"], None, "dictionary"),
        ("transfer.backends", "UCX", None, "list"),
        # names that do not exist
        ("models.0.decode.engine", "triton", None, "'vllm', 'sglang' or 'sim'"),
        ("transfer.required_transport", "roce", None, "'rdma'"),
        ("device", "tpu", None, "'cuda'"),
        # what is missing
        ("models", REMOVED, None, "missing"),
        ("models.0.decode", REMOVED, None, "missing"),
        ("models.0.source", REMOVED, None, "missing"),
        ("models.0.source", "", None, "at least 1 character"),
        ("models", [], None, "at least 1 item"),
        ("transfer.backends", [], None, "at least 1 item"),
        # sections that contradict each other
        ("models", [MODEL, MODEL], "models.1.name", r"'tiny' and models.0.name 'tiny' would be the same deployment"),
        ("models", [MODEL, named("b/c"), named("b-c")], "models.2.name", r"models.1.name 'b/c' .* \(decode-b-c\)"),
        ("models.0.decode.python", "", None, "at least 1 character"),
        ("models.0.aggregated", {"engine": "sim"}, "models.0", "aggregated and decode must run the same engine"),
        ("models.0.aggregated", {"replicas": 0}, "models.0.aggregated.replicas", "got 0"),
        ("models", [{**ALONE, "aggregated": {}}], "models.0", "aggregated is for beside a prefill pool"),
        # routing
        ("models.0.routing.placement", {"policy": "always"}, None, "'predicted', 'thresholds', 'remote'"),
        (
            "models.0.routing.placement",
            {"policy": "thresholds", "max_local_tokens": -1},
            "models.0.routing.placement.max_local_tokens",
            "got -1",
        ),
        ("models.0.routing.decode_weights.prefix", -0.5, None, "got -0.5"),
        ("models.0.decode", {"replicas": 2, "autoscaling": {"max_replicas": 4}}, None, "not both"),
        ("frontend", {"replicas": 2, "autoscaling": {}}, None, "not both"),
        ("transfer", REMOVED, None, "models.0.prefill is set"),
        ("transfer", None, None, "`transfer: {}` takes the defaults"),
        ("transfer", {"port_min": 20001, "port_max": 20000}, None, "port_min 20001 is above port_max 20000"),
        (
            "transfer",
            {"required_transport": "nvlink", "backends": ["LIBFABRIC"]},
            None,
            r"backends: \[UCX\], or one of rdma",
        ),
        ("transfer", {"required_transport": "shm", "backends": ["LIBFABRIC"]}, None, "nothing that LIBFABRIC offers"),
        ("transfer", {"required_transport": "tcp", "backends": ["UCX", "GDS"]}, None, r"\[UCX\] or \[LIBFABRIC\] only"),
        # keys, and what clients may send
        ("security", {"keys": "keys.yaml", "open": True}, None, "open: true is for a service without keys"),
        ("security.keys", "", None, "at least 1 character"),
        ("models.0.server_args", {"api_key": ["x"]}, None, "set security.keys, which guards all"),
        ("models.0.vllm_xargs", ["ec_transfer_params"], None, "ec_transfer_params is not for clients"),
        ("models.0.vllm_xargs", ["baton_prefill"], None, "baton_prefill is not for clients"),
        # names that do not fit into URLs and labels
        ("models.0.name", "my model", None, "got 'my model'"),
        ("models.0.name", "tiny\n", None, "URLs and metric labels"),
        ("models.0.name", "", None, "at least 1 character"),
    ],
)
def test_a_broken_configuration_is_refused_by_its_field(path: str, value: Any, field: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(changed(path, value))
    assert caught.value.field == (field or path)


def test_pages_of_the_same_origins_may_ask_for_every_model() -> None:
    """A browser asks before it sends the request that names a model."""
    models = [
        {"name": name, "source": "baton:tiny", "decode": {"engine": "sim"}, "server_args": {"allowed_origins": origins}}
        for name, origins in (("a", ["http://page"]), ("b", ["http://page"]), ("c", ["http://other"]))
    ]
    parse({"models": models[:2]})
    with pytest.raises(ConfigError, match=r"the same as models\.0") as caught:
        parse({"models": models})
    assert caught.value.field == "models.2.server_args.allowed_origins"


@pytest.mark.parametrize("args", [None, [], "models"])
def test_args_that_are_no_mapping_are_refused(args: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(args)
    assert caught.value.field == "args"


def test_the_error_says_how_many_more_there_are() -> None:
    args = changed("models.0.decode", {"replicas": 0, "nodes": 1, "gpus": 1})
    with pytest.raises(ConfigError, match=r"got 0 \(and 2 more\)$"):
        parse(args)


@pytest.mark.parametrize("path", ["models.0", "models.0.prefill", "models.0.decode"])
@pytest.mark.parametrize(("name", "instead"), OWNED_ARGS["vllm"].items())
def test_an_engine_argument_that_baton_sets_is_refused_with_where_to_set_it(path: str, name: str, instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(f"{path}.engine_args", {name: 1}))
    assert caught.value.field == path
    assert f"engine_args.{name} " in caught.value.problem
    assert instead in caught.value.problem


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (lambda config: config, "device"),
        (lambda config: config.models[0], "name"),
        (lambda config: config.models[0].decode, "replicas"),
        (lambda config: config.models[0].decode.resources, "num_cpus"),
        (lambda config: config.transfer, "lease_s"),
        (lambda config: config.limits, "max_attempts"),
    ],
)
def test_a_setting_cannot_be_changed_after_validation(section: Any, name: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section(parse(MINIMAL)), name, getattr(section(parse(MINIMAL)), name))


def test_a_pools_engine_arguments_win_over_the_models() -> None:
    args = changed("models.0.engine_args", {"max_model_len": 4096, "block_size": 32})
    args["models"][0]["decode"] = {"engine_args": {"block_size": 64, "max_num_seqs": 8}}
    model = parse(args).models[0]
    assert model.prefill is not None
    assert model.merged_engine_args(model.decode) == {"max_model_len": 4096, "block_size": 64, "max_num_seqs": 8}
    assert model.merged_engine_args(model.prefill) == {"max_model_len": 4096, "block_size": 32}
