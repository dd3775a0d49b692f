"""A model of the core as one of lm-evaluation-harness."""

import importlib.util
import inspect
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from tqdm import tqdm

if importlib.util.find_spec("lm_eval") is None:
    raise ModuleNotFoundError("lm-eval is not installed: pip install 'lm-eval>=0.4.13'", name="lm_eval")

import lm_eval.models  # noqa: F401  # the harness registers its own models only before any other
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from ..core import LanguageModel
from .answers import Answers, Settings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@register_model("lamemo")
class LamemoLM(LM):  # type: ignore[misc]  # the harness may be absent
    """A language model with memory, which reads every text whole.

    Args:
        pretrained: a folder of the core, or one that was exported for transformers.
        batch_size: texts that are read side by side.
        max_batch_size: for ``--batch_size auto``, which is refused.
        device: such as ``cuda:0``; a GPU if there is one.
        dtype: of the weights; None for that of the folder.

    Raises:
        ValueError: an argument makes no sense.
        OSError: the folder cannot be read.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: Union[int, str] = 1,
        max_batch_size: Optional[int] = None,
        device: Optional[str] = None,
        dtype: Optional[str] = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ValueError(f"--batch_size {batch_size} is not served: pass the number of texts to read side by side")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype} is not known: pass one of {', '.join(DTYPES)}")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"the device is {device}, and there is no GPU: pass --device cpu, and none in --model_args (the "
                "harness takes cuda unless it is told)"
            )
        model = LanguageModel.load(pretrained).to(self._device).eval()
        self.model = model if dtype is None else model.to(DTYPES[dtype])
        self.batch_size = int(batch_size)
        self._folder = str(pretrained)
        self._answers = Answers(self.model, self.batch_size, self._tell)
        self._bar: Optional[Any] = None

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Optional[Dict[str, Any]] = None) -> "LamemoLM":
        """Build a model from ``--model_args``, as `create_from_arg_obj` does."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Dict[str, Any], additional_config: Optional[Dict[str, Any]] = None
    ) -> "LamemoLM":
        """Build a model. ``--model_args`` take precedence over the harness's own options.

        Raises:
            ValueError: a name is not known, or there is no ``pretrained``.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in arg_dict:
            if name not in known:
                raise ValueError(f"--model_args {name}: it is not known, the names are {', '.join(known)}")
        if "pretrained" not in arg_dict:
            raise ValueError("--model_args has no pretrained=FOLDER")
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

    @property
    def tokenizer_name(self) -> str:
        """The folder, after which the harness names its stored results."""
        return self._folder

    def loglikelihood(self, requests: List[Instance], disable_tqdm: bool = False) -> List[Tuple[float, bool]]:
        """Return each continuation's log-probability given its context, and whether greedy decoding gives it."""
        pairs = [request.args for request in requests]
        with self._progress(len(requests), disable_tqdm):
            answers = [tuple(likelihood) for likelihood in self._answers.continuations(pairs)]
        return self._remembered("loglikelihood", pairs, answers)

    def loglikelihood_rolling(self, requests: List[Instance], disable_tqdm: bool = False) -> List[float]:
        """Return the log-probability of each document; its memory is carried from its beginning to its end."""
        texts = [request.args for request in requests]
        with self._progress(len(requests), disable_tqdm):
            answers = self._answers.documents([text for (text,) in texts])
        return self._remembered("loglikelihood_rolling", texts, answers)

    def generate_until(self, requests: List[Instance], disable_tqdm: bool = False) -> List[str]:
        """Return a continuation of each context, up to one of the strings that end it."""
        given = [request.args for request in requests]
        with self._progress(len(requests), disable_tqdm):
            answers = self._answers.continued([(context, Settings.of(settings)) for context, settings in given])
        return self._remembered("generate_until", given, answers)

    def _remembered(self, name: str, requests: List[Any], answers: List[Any]) -> List[Any]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(name, request, answer)
        return answers

    def _progress(self, number: int, disable: bool) -> Any:
        self._bar = tqdm(total=number, disable=disable, desc="requests")
        return self._bar

    def _tell(self, number: int) -> None:
        if self._bar is not None:
            self._bar.update(number)
