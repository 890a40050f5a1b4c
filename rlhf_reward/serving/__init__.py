"Serve a reward model over HTTP: `serve` runs a server, `make_app` builds its application."
try:
    import fastapi # noqa: F401
    import fastapi_offline # noqa: F401
    import prometheus_client # noqa: F401
    import uvicorn # noqa: F401
except ImportError as error:
    raise ImportError(f"The server needs the extra serve ({error}): pip install 'rlhf_reward[serve]'") from error

from .batching import BATCHES_PER_DRAIN, Batcher, QueueFull
from .routes import logger, make_app
from .schemas import (
    AttributesAnswer,
    ClassifyAnswer,
    ClassifyRequest,
    ClassifyResult,
    Conversation,
    Ids,
    Message,
    Problem,
    RankAnswer,
    RankedResponse,
    RankRequest,
    RequestModel,
    RewardRequest,
    ScoreAnswer,
    ScoreRequest,
    Text,
    Usage,
)
from .server import check_address, serve

# Earlier names
AT_ONCE = BATCHES_PER_DRAIN
Asked = RequestModel
Busy = QueueFull
Class = ClassifyResult
Said = Text

__all__ = [
    "AT_ONCE",
    "BATCHES_PER_DRAIN",
    "Asked",
    "Batcher",
    "Busy",
    "Class",
    "AttributesAnswer",
    "ClassifyAnswer",
    "ClassifyRequest",
    "ClassifyResult",
    "Conversation",
    "Ids",
    "Message",
    "Problem",
    "QueueFull",
    "RankAnswer",
    "RankRequest",
    "RankedResponse",
    "RequestModel",
    "RewardRequest",
    "Said",
    "ScoreAnswer",
    "ScoreRequest",
    "Text",
    "Usage",
    "check_address",
    "logger",
    "make_app",
    "serve",
]
