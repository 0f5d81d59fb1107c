"""Machines: where the line runs. Nothing here bears on what is built."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from configs.base import Frozen
from configs.train import Fp8Backend

Device = Literal["auto", "cpu", "cuda", "npu"]
Compute = Literal["auto", "float32", "bfloat16"]
Recompute = Literal["none", "attention", "all"]
"""What a layer computes again in the backward pass: nothing, its attention, or all but routing and
the exchange of tokens, which would cost a network twice."""


class ClusterConfig(Frozen):
    """The Ray cluster and the worker groups on it."""

    address: str | None = None
    """A running Ray cluster; none starts a local one for the run."""
    trainers: PositiveInt = 2
    """Training workers. Layers are divided over them as `pp` says, experts as `ep`, and a batch's
    rows over those that hold the same layers."""
    pp: PositiveInt = 1
    """Into how many pipeline stages the model's layers are divided, each held by `trainers` / `pp`
    trainers; 1 leaves every trainer all layers. More can be planned, but not trained yet."""
    ep: PositiveInt | None = None
    """Over how many trainers a layer's experts are divided; none is all that hold the layer. With
    fewer, every `ep` trainers hold all experts between them: tokens stay nearer, and gradients
    travel more."""
    micro_batches: PositiveInt = 1
    """In how many parts, one after another, each trainer takes its rows of a step of pretraining.
    Their gradients add up to those of the whole, but for rounding, of which FP8 has most; only one
    part's activations are there at a time."""
    recompute: Recompute = "none"
    """What each layer computes a second time in the backward pass, in place of keeping it: nothing,
    its attention, or `all`, which leaves out routing and the exchange of tokens. No number of the
    training changes."""
    samplers: PositiveInt = 2
    """Generation workers of post-training."""
    data_workers: PositiveInt | None = None
    """Processes that prepare data. None means one, the driver itself, where sources are below
    64 MB, and otherwise as many on Ray as the driver's machine has cores, or two for every 64 MB
    where those are fewer; 1 is the driver alone. The corpus is the same."""
    device: Device = "auto"
    """What workers compute on. `auto` takes the accelerators that are there: on a named cluster
    those that Ray counts, otherwise those that torch sees; without any, CPUs. Every trainer takes
    one of its own; samplers share with them what is left."""
    compute: Compute = "auto"
    """What training and sampling compute in, around what is FP8; weights and gradients are
    float32. `auto` is bfloat16 on accelerators and float32 on CPUs. A CPU computes in bfloat16 if
    it has units for it (avx512_bf16, amx_bf16); evaluation and export there stay float32."""
    placement: Literal["pack", "spread"] = "pack"
    """Whether the workers of a group stay on one machine where it has room, or go to as many as
    there are."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.5
    """CPUs that each worker reserves; fractions let trainers and samplers share a small machine."""
    threads_per_worker: PositiveInt = 1
    fp8_backend: Fp8Backend = "auto"
    """Who computes where `precision = "fp8"`: `reference` is slow and defines the others."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a worker group is rebuilt after a worker dies, before the run gives up."""
    placement_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest wait for free CPUs."""
    startup_timeout_seconds: Annotated[float, Field(gt=0)] = 180.0
    """Longest wait for a placed worker to import its libraries and load its model."""
    step_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for one call on a worker, or for one collective."""
    parallel_nodes: PositiveInt | None = None
    """How many nodes of the line that do not need each other are built at a time; none means as
    many as the driver's cores bear: one below 8, then one for every 4, 4 at most."""

    @property
    def stage_trainers(self) -> int:
        """How many trainers hold the same layers."""
        return self.trainers // self.pp

    @property
    def stage_settings(self) -> str:
        """The settings that `stage_trainers` is made of, for messages."""
        return "cluster.trainers" if self.pp == 1 else "cluster.trainers / cluster.pp"

    def misfit(self, experts: int) -> str | None:
        """Why a layer of so many experts is not divided evenly; none if it is."""
        ranks = self.ep or self.stage_trainers
        if experts % ranks == 0:
            return None
        over = self.stage_settings if self.ep is None else "cluster.ep"
        without = ", which leaves some without any" if ranks > experts else ""
        return f"does not divide over {over} = {ranks}{without}"

    @model_validator(mode="after")
    def _divides_ranks(self) -> Self:
        if fault := degrees_fault(self.trainers, self.pp, self.ep):
            raise ValueError(fault)
        return self

    @field_validator("address")
    @classmethod
    def _names_a_port(cls, address: str | None) -> str | None:
        if address is not None and address != "auto" and ":" not in address:
            raise ValueError("names no port; write it as HOST:6379, or auto on the cluster itself")
        return address


def degrees_fault(trainers: int, pp: int, ep: int | None) -> str | None:
    """Why so many trainers do not divide into these degrees; none if they do."""
    if pp < 1 or trainers % pp:
        return f"cluster.pp = {pp} does not divide cluster.trainers = {trainers}; choose a divisor"
    if ep is None or (ep > 0 and trainers // pp % ep == 0):
        return None
    if pp == 1:
        return f"cluster.ep = {ep} does not divide cluster.trainers = {trainers}; choose a divisor"
    return (
        f"cluster.pp * cluster.ep = {pp} * {ep} does not divide cluster.trainers = {trainers}; "
        f"set cluster.ep to a divisor of cluster.trainers / cluster.pp = {trainers // pp}"
    )


def nodes_at_once(asked: int | None, cores: int) -> int:
    """How many nodes are built at a time, if so many are asked for on so many cores."""
    if asked is not None:
        return asked
    # A node may fill two cores by itself, and what runs beside it on fewer slows it down.
    return 1 if cores < 8 else min(4, cores // 4)


NO_SCHEME = (
    "an address of MLflow begins with what it is: http://HOST:5000 for a server, or "
    "sqlite:///PATH, postgresql+psycopg2://... for a database"
)
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


def is_tracking_address(uri: str) -> bool:
    """Whether it begins as an address of MLflow that runs can be recorded at."""
    scheme, mark, _ = uri.partition("://")
    return bool(mark) and scheme.partition("+")[0] in _SCHEMES


class TrackingConfig(Frozen):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking URI; none means the variable MLFLOW_TRACKING_URI, and without that a SQLite
    file inside the store."""
    experiment: str = Field(default="ingot", min_length=1)
    registered_model: str = Field(default="ingot", min_length=1)
    """What names of registered models begin with; the recipe's name follows: `ingot-tiny`."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 5.0

    @field_validator("uri")
    @classmethod
    def _has_a_scheme(cls, uri: str | None) -> str | None:
        if uri is not None and not is_tracking_address(uri):
            raise ValueError(NO_SCHEME)
        return uri


class StoreConfig(Frozen):
    """Where artifacts live."""

    url: str = ".ingot"
    """A folder, or a place of objects: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER. Who may use such a
    place is said in the environment, as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL, and never here."""
    cache_bytes: int = Field(default=50_000_000_000, ge=0)
    """Of a place of objects a run keeps copies up to this size, in the user's cache or below
    XDG_CACHE_HOME; those unused for longest go first."""

    min_free_bytes: int = Field(default=500_000_000, ge=0)
    """A build does not start with less free disk than this."""

    @field_validator("url")
    @classmethod
    def _is_no_slip(cls, url: str) -> str:
        scheme, mark, rest = url.partition(":/")
        if mark and scheme in ("s3", "s3a", "gs", "gcs") and not rest.startswith("/"):
            raise ValueError(f"would be a folder of this machine; did you mean {scheme}://{rest}?")
        return url

    @field_validator("url")
    @classmethod
    def _holds_no_login(cls, url: str) -> str:
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise ValueError("holds a login, which belongs in the environment; leave it out")
        return url
