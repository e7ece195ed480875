"""How a canvas is denoised, as plain values: what `chat`, `generate` and a checkpoint's `generation_config.json` take.

A canvas of `max_new_tokens` tokens is filled block by block, left to right, each block in `steps / blocks` model calls;
within a step the surest tokens are committed (Nie et al., LLaDA, arXiv:2502.09992, algorithms 4 and 5). The settings of
published systems are values of these fields; what each calls its own is said there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dmllm.nn.visibility import check_layout
from dmllm.registry import Table, nearest
from dmllm.samplers.policy import CachePolicy
from dmllm.samplers.schedules import CURVES, MASKGIT, check_process

REMASKING = Table(
    "remasking rule",
    {
        "low_confidence": "dmllm.samplers.rules:low_confidence",
        "margin": "dmllm.samplers.rules:margin",
        "entropy": "dmllm.samplers.rules:entropy",
        "random": "dmllm.samplers.rules:random_order",
        "origin": "dmllm.samplers.rules:random_order",
        "sequential": "dmllm.samplers.rules:sequential",
    },
)
SCHEDULES = ["even", "fixed", "carried", "time", "first_hitting", "confident", *CURVES, *MASKGIT]
OPTIONAL = {  # what None says
    "threshold": "the quota alone",
    "factor": "the quota alone",
    "entropy_bound": "the quota alone",
    "kl_threshold": "no such condition",
    "revoke_threshold": "no revoking",
    "editing_threshold": "no editing",
}
SURE = ("threshold", "factor", "entropy_bound")  # three ways to say what is sure enough
COUNTS = ("steps", "block_steps", "num_to_transfer")  # three ways to say how many tokens a call commits


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Everything that decides which token is committed when; randomness is a generator, passed beside it."""

    max_new_tokens: int = 64
    """Length of the canvas in tokens; a reply that ends earlier is cut there."""
    steps: int | None = None
    """Model calls for the whole canvas, shared equally by the blocks; None is one token a call. An upper bound where
    `threshold` or an end of sequence finishes sooner."""
    block_length: int | None = None
    """Tokens of a block; a block is filled before the next begins, and the last may be shorter. None is one block, or
    for a block-causal model the block it was trained with. That counts blocks from the beginning of the prompt, and
    fills the last one whole (what exceeds `max_new_tokens` is cut)."""
    sub_block_length: int | None = None
    """Tokens of a sub-block; within a block one is filled before the next begins, each call seeing the whole block
    (Fast-dLLM v2's small_block_size). None, or the block's length and more, is the block itself."""
    blocks_ahead: int | None = None
    """How many blocks behind the active one a model with full attention sees, the others not being opened yet: 0 opens
    one after the other until a reply ends, so that `max_new_tokens` may be generous; None is all of them."""
    block_steps: int | None = None
    """Model calls for each block, in place of `steps`: SDAR's denoising_steps, LLaDA2's steps."""
    num_to_transfer: int | None = None
    """Tokens that a call commits at least, in place of `steps` (LLaDA2.1)."""
    schedule: str = "even"
    """How many tokens a call commits at least. even: what is open in the block, shared by the calls that remain for it.
    fixed: the block's length shared by its calls, however many are known already (SDAR, LLaDA2). carried: one, and of
    an even share what is surer than `threshold`; the rest goes over to later calls, in the end as many as it takes
    (Fast-dLLM for Dream). time: of m open ones int(m (1 - s/t)) from time t to s, which may be none, and all at the
    last (Dream's quota). first_hitting: one, drawn, at the time drawn for it (BD3-LM). confident: what is surer than
    `threshold`; where nothing is, the same as time from the share t that is open to the next time s at which that is a
    token or more, or the last (Dimple's confident decoding). linear, shift, cosine, logit_normal: the steps of that
    curve, the largest ones last for `shift` above 1 (LaViDa). maskgit: all but the share of what was open at first that
    `noise_schedule` leaves; maskgit_fixed: but that share of the block, and one until the last call (MMaDA)."""
    shift: float = 3.0
    """Of `schedule: shift`: the curve is shift t / (1 + (shift - 1) t); 1 is linear."""
    eps: float = 1e-3
    """Where the times of `schedule: time` end: linspace(1, eps, calls + 1)."""
    noise_schedule: str = "linear"
    """How much is masked at a time: linear (t itself), cosine, polynomial, square, cubic, sigmoid, as in training.
    `schedule: time` goes from what it masks at t to that at s, not from t to s; a model may be told t."""
    remasking: str = "low_confidence"
    """Which tokens come first: low_confidence (those of highest probability; Dream's maskgit_plus), margin (over the
    runner-up; topk_margin), entropy (lowest), random, sequential (leftmost, or as a canvas says), origin (random; under
    `schedule: time` each by itself with probability 1 - s/t, as in the diffusion process); or your own rule as
    "module:function"."""
    order_temperature: float = 0.0
    """Gumbel noise of this scale on the logarithm of the probability by which low_confidence ranks (MaskGIT's choice
    temperature); 0 is none."""
    order_cooling: str = "linear"
    """How it fades: linear (times the share of calls to come; MaskGIT), compounding (by that at each call; MMaDA),
    constant (Lumina-DiMOO)."""
    sampling: str = "inverse"
    """What a token is drawn by: inverse (one random number each, so that no other row changes it), multinomial or
    gumbel (one for each word, in the order of the codes of MMaDA and Lumina-DiMOO, whose tokens it then gives)."""
    threshold: float | None = None
    """Also commit every token at least this probable, so that a step may commit many; None is the quota alone."""
    factor: float | None = None
    """Also commit the n most probable tokens where the n-th is at least 1 - factor / (n + 1) probable (Fast-dLLM's
    factor-based decoding; 1 is usual), in place of `threshold`."""
    entropy_bound: float | None = None
    """Also commit the first tokens in the order of `remasking` whose entropies, but for the largest, sum to at most
    this many nats (EB-Sampler; DiffusionGemma's 0.1 goes with remasking: entropy), in place of `threshold`."""
    kl_threshold: float | None = None
    """What `threshold` also commits must have a prediction that changed by less than this many nats from call to call
    (KLASS; 0.01 is usual), and the quota is for calls in which there is none; None asks for no such thing."""
    kl_history_length: int = 2
    """In each of how many changes up to now."""
    early_exit_thresholds: list[float] = field(default_factory=list)
    """Commit all that is open in the block, once its most probable tokens are on average this far ahead of the next, in
    logits: in the first, second and last third of the block's calls (Prophet; 7.5, 5, 2.5); [] never does."""
    revoke_threshold: float | None = None
    """Open a token of the active block again that is less probable than this, given the others (WINO's threshold_back;
    it goes with a low `threshold`, and takes a second call of the model in each); None never does."""
    remdm: str | None = None
    """How likely a committed token is masked again from time t to s, under `schedule: time` and `remasking: origin`:
    cap (`eta`, at most s / (1 - t)), rescale (`eta` s / (1 - t)), conf (s / (1 - t) shared out, the larger part to what
    was less probable when it was committed), loop (`eta`, while 9 of 10 tokens stay known from t = 0.55 to 0.05),
    forward_backward ((t - s) / (1 - t)), psi (`eta` s); None is not at all (ReMDM, `samplers.schedules`)."""
    eta: float = 0.02
    """Of `remdm`: 0 masks nothing again, 1 as much as there can be."""
    suppress_ids: list[int] = field(default_factory=list)
    """Tokens that are never produced (LLaDA's logits_eos_inf, with the end of sequence here)."""
    distrust_ids: list[int] = field(default_factory=list)
    """Tokens that are committed last, wherever they are the choice (LLaDA's confidence_eos_eot_inf)."""
    choose_mask: bool = False
    """Whether the mask token may be chosen: the place stays open, the call is spent, and what is open when a block's
    calls are over remains a mask, as in the code of LLaDA, LLaDA-V and LaViDa; False never chooses it."""
    count_mask: bool = False
    """Whether the probability of the mask token, which is never produced, speaks against the others, as it does in the
    authors' softmax; False shares it out."""
    temperature: float = 0.0
    """0 takes the most probable token; above, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this much probability; 1 is all of them."""
    visibility: str | None = None
    """Who sees whom: full (the prompt sees the answer), prefix (it does not, and is computed once), causal; None is
    what the checkpoint says, the choice of LaViDa's prefix_lm."""
    cache: CachePolicy | dict[str, Any] | str | None = None
    """What is kept though it changes, in models with full attention: prefix or dual (Fast-dLLM), or the fields of
    `samplers.policy.CachePolicy`; None keeps what is exact alone."""
    cfg_scale: float = 0.0
    """Guidance away from the unprompted answer: un + (cfg_scale + 1)(cond - un), twice the work; 0 is none."""
    cfg_masks_draft: bool = False
    """Whether the unprompted answer goes without the draft and `suffix_ids` too (Lumina-DiMOO); False keeps them, as
    LLaDA-V does."""
    suffix_ids: list[int] = field(default_factory=list)
    """Tokens that stand behind the canvas from the beginning, as Lumina-DiMOO's </answer>; no part of the answer."""
    eos_token_id: int | list[int] | None = None
    """Tokens that end a reply; None is the checkpoint's own, [] never ends one early."""
    stop_sequences: list[list[int]] = field(default_factory=list)
    """Runs of tokens that end a reply too, e.g. the ids of a word (LLaDA-V's stopping_criteria)."""
    gaussian: dict[str, Any] | None = None
    """For models that denoise vectors: sampler and clamp, the fields of `samplers.gaussian.GaussianDecoding`."""
    uniform: dict[str, Any] | None = None
    """For models that undo random words: sampler (ancestral, commit, entropy_bound), kappa, corrections and the other
    fields of `samplers.uniform.UniformDecoding`."""
    constraint: Any = None
    """What an answer's text must match, whatever the other settings: a regular expression (as `re.fullmatch` reads
    it), a JSON schema (a dict), or a list with one, a list of choices, or None for each request of a batch."""
    choices: list[Any] | None = None
    """The texts that an answer may be; or a list with one such list, or None, for each request of a batch."""
    prompt_first: bool = False
    """Whether the first token is the most probable one that the prompt alone predicts, known before the first call: for
    models of which a row predicts the next token, where the prompt does not see the answer (LaViDa-Dream). For
    block-causal ones each block's first token, which the call that stores what stands before it (`store_calls`, here
    implied) also gives: Fast-dLLM v2's autoregressive step. With an approximate `cache` the first call on a block
    commits its first token and no other (Fast-dLLM for Dream)."""
    fill_behind_eos: bool = True
    """Whether tokens behind a known end of sequence are still committed; False leaves them open (LLaDA-V)."""
    eos_early_stop: bool = True
    """Stop once a reply is known up to its end; False first completes the block that holds it (SDAR, LLaDA2)."""
    editing_threshold: float | None = None
    """Replace a token committed in the active block where another has become more probable than this (LLaDA2.1), and
    go on, once the block is full, until nothing is replaced; None never changes a committed token."""
    max_post_steps: int = 16
    """At most this many calls on a full block, when editing."""
    store_calls: bool = False
    """Whether finished blocks, the prompt's before all, have calls of their own in which their keys and values are
    stored, as SDAR counts them; False stores them along with the next block's first call. For block-causal models."""
    sub_block_cache: bool = False
    """Whether a call feeds the active sub-block alone once its first token is known, the keys and values of the others
    being those of the last call that fed them: less work, but not exact (Fast-dLLM v2's use_block_cache)."""
    speculate: int = 0
    """For models that predict the next token, which take one call a token whatever is said of steps, blocks, order and
    thresholds: so many tokens that their heads draft, of which the next call keeps those that it would have said."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "steps", "block_length", "sub_block_length", "block_steps", "num_to_transfer"):
            _whole(name, getattr(self, name), least=1, optional=name != "max_new_tokens")
        for name in ("max_post_steps", "speculate"):
            _whole(name, getattr(self, name), least=0, optional=False)
        for name in (*OPTIONAL, "eps", "eta", "order_temperature", "temperature", "top_p", "cfg_scale"):
            value, optional = getattr(self, name), name in OPTIONAL
            if not (value is None and optional) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name}={value!r} must be a number{' or None' if optional else ''}.")
        if self.choices is not None and (self.constraint is not None or not isinstance(self.choices, list | tuple)):
            raise ValueError(f"choices={self.choices!r:.200} must be a list of texts, and go without constraint=.")
        if self.stop_sequences and (self.constraint is not None or self.choices is not None):
            raise ValueError("stop_sequences: a constraint says where the text ends; leave them out.")
        if any(type(i) is not int for i in self.stop_ids):
            raise ValueError(f"eos_token_id={self.eos_token_id!r} must be a token id, a list of them, or None.")
        if any(not run or any(type(i) is not int for i in run) for run in self.stop_sequences):
            raise ValueError(f"stop_sequences={self.stop_sequences!r} must be a list of lists of token ids.")
        for name in ("suppress_ids", "distrust_ids", "suffix_ids"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or any(type(i) is not int for i in value):
                raise ValueError(f"{name}={value!r} must be a list of token ids.")
        for name, value, table in (("remasking", self.remasking, REMASKING), ("schedule", self.schedule, SCHEDULES)):
            if value not in table and (name == "schedule" or ":" not in str(value)):
                raise ValueError(f"{name}={value!r} is not a known rule; {nearest(str(value), table)}")
        if isinstance(self.shift, bool) or not isinstance(self.shift, int | float) or not 0 < self.shift < float("inf"):
            raise ValueError(f"shift={self.shift!r} must be a number above 0; 1 is linear, 3 is usual.")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps} must lie between 0 and 1; 1e-3 is usual.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (most probable token) or above; 1.0 is the model's."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and at most at 1 (all tokens).")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"top_p={self.top_p} has no effect at temperature=0; set a temperature or top_p=1.0.")
        if not 0 <= self.cfg_scale < float("inf"):
            raise ValueError(f"cfg_scale={self.cfg_scale} must be 0 (no guidance) or above.")
        if self.visibility is not None:
            check_layout(self.visibility)
        sub, block = self.sub_block_length, self.block_length
        if sub and block and sub < block and block % sub:
            below = max(n for n in range(1, sub) if block % n == 0)
            raise ValueError(f"sub_block_length={sub} does not divide block_length={block}; try {below} or {block}.")
        _check_rules(self)
        CachePolicy.of(self.cache)
        self.steps_per_block(self.max_new_tokens)

    @property
    def chosen(self) -> dict[str, Any]:
        """What says more than nothing: the length, and every field that is not at its default."""
        own = DecodeConfig()
        return {
            f.name: value
            for f in fields(self)
            if (value := getattr(self, f.name)) != getattr(own, f.name) or f.name == "max_new_tokens"
        }

    def block_of(self, length: int) -> int:
        """The block length for a canvas of `length` tokens."""
        return min(self.block_length or length, length)

    def steps_per_block(self, length: int) -> int:
        """Model calls for each block of a canvas of `length` tokens. Raises ValueError if `steps` does not divide."""
        block = self.block_of(length)
        blocks = -(-length // block)
        if self.block_steps is not None:
            return self.block_steps
        if self.steps is None:
            return block
        if self.steps % blocks:
            below = self.steps // blocks * blocks
            raise ValueError(
                f"steps={self.steps} is not divisible by the {blocks} blocks of {block} tokens; "
                f"try {f'{below} or ' if below else ''}{below + blocks}."
            )
        return self.steps // blocks

    def calls_per_block(self, length: int) -> int | None:
        """How many calls every block of an open canvas takes; None where that depends on what the model says."""
        block = self.block_of(length)
        own, rules = DecodeConfig(), ("threshold", "factor", "entropy_bound", "remdm", "revoke_threshold")
        rules += ("editing_threshold", "constraint", "choices", "blocks_ahead", "early_exit_thresholds")
        if any(getattr(self, name) != getattr(own, name) for name in rules) or self.choose_mask:
            return None
        if self.schedule != "even" or length % block:
            return None
        if self.num_to_transfer is not None:
            return -(-block // self.num_to_transfer)
        return min(self.steps_per_block(length), block) if self.fill_behind_eos else None

    def in_whole_blocks(self, block_length: int) -> DecodeConfig:
        """These settings for a block-causal model: blocks of `block_length` unless said, and calls counted by block."""
        own = replace(self, block_length=self.block_length or block_length)
        if self.num_to_transfer is not None or self.block_steps is not None:
            return own
        steps = own.block_length if self.steps is None else own.steps_per_block(self.max_new_tokens)
        return replace(own, steps=None, block_steps=steps)

    @property
    def draws_tokens(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0

    @property
    def quota_if_unsure(self) -> bool:
        """Whether the quota is for calls in which nothing is sure, rather than what every call commits at least."""
        return self.schedule == "confident" or self.kl_threshold is not None

    @property
    def rewrites(self) -> bool:
        """Whether a committed token may be replaced or opened again, as long as its block is the active one."""
        return not (self.editing_threshold is None and self.revoke_threshold is None and self.remdm is None)

    @property
    def reads_runner_up(self) -> bool:
        """Whether a rule looks at the second most probable token; one of one's own may."""
        return self.remasking == "margin" or ":" in self.remasking or bool(self.early_exit_thresholds)

    @property
    def reads_entropy(self) -> bool:
        """Whether a rule looks at entropies; one of one's own may."""
        return self.remasking == "entropy" or ":" in self.remasking or self.entropy_bound is not None

    @property
    def draws_order(self) -> bool:
        """Whether the order in which tokens are committed is; a rule of one's own may draw."""
        ranked = ("low_confidence", "margin", "entropy", "sequential")
        return self.remasking not in ranked or self.order_temperature > 0

    @property
    def post_steps(self) -> int:
        """Calls on a full block, at most: those that edit it, or the one that stores it."""
        return self.max_post_steps if self.editing_threshold is not None else int(self.store_calls)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def stops(self) -> tuple[int | tuple[int, ...], ...]:
        """All that ends a reply: `stop_ids` and `stop_sequences`."""
        return (*self.stop_ids, *(tuple(run) for run in self.stop_sequences))


def decode_config(options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> DecodeConfig:
    """The configuration for one call: `options` over a checkpoint's `defaults`.

    Of the defaults only the fields above count: a `generation_config.json` carries other keys for other programs.

    Raises:
        ValueError: an option is unknown (the nearest known one is named), or a value is refused.
    """
    known = [f.name for f in fields(DecodeConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"Unknown decode option {name!r}; {nearest(name, known)}")
    chosen = {k: v for k, v in (defaults or {}).items() if k in known}
    if any(name in options for name in COUNTS) or options.get("schedule") == "first_hitting":
        chosen = {k: v for k, v in chosen.items() if k not in COUNTS}
    if any(options.get(name) is not None for name in SURE):
        chosen = {k: v for k, v in chosen.items() if k not in SURE}
    return DecodeConfig(**{**chosen, **options})


def _whole(name: str, value: Any, *, least: int, optional: bool) -> None:
    if not (value is None and optional) and (type(value) is not int or value < least):
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}{' or None' if optional else ''}.")


def _check_rules(config: DecodeConfig) -> None:
    """Refuse rules that do not go together, and numbers that they cannot take."""
    for names in (COUNTS, SURE):
        said = [f"{name}={value}" for name in names if (value := getattr(config, name)) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} say the same thing twice; give one of them.")
    for name, none in OPTIONAL.items():
        value, probability = getattr(config, name), name.endswith("threshold") and name != "kl_threshold"
        if value is not None and not (0 <= value <= 1 if probability else 0 <= value < float("inf")):
            what = "is a probability between 0 and 1" if probability else "must be 0 or above"
            raise ValueError(f"{name}={value} {what}, or None for {none}.")
    _whole("kl_history_length", config.kl_history_length, least=1, optional=False)
    if config.kl_threshold is not None and config.threshold is None:
        raise ValueError(f"kl_threshold={config.kl_threshold} is a condition on what threshold commits; say it too.")
    gaps = config.early_exit_thresholds
    if not isinstance(gaps, list | tuple) or len(gaps) not in (0, 3) or any(type(g) not in (int, float) for g in gaps):
        raise ValueError(f"early_exit_thresholds={gaps!r} must be three numbers, e.g. [7.5, 5.0, 2.5], or [].")
    check_process(config)
    if config.remdm is not None and (config.constraint is not None or config.choices is not None):
        raise ValueError(f"remdm={config.remdm!r} masks again what a constraint rests on; leave one of them out.")
    if config.revoke_threshold is not None and all(getattr(config, name) is None for name in SURE):
        raise ValueError(f"revoke_threshold={config.revoke_threshold} goes with a low threshold; say it, e.g. 0.6.")
    _whole("blocks_ahead", config.blocks_ahead, least=0, optional=True)
    if config.blocks_ahead is not None and (config.block_length is None or config.suffix_ids or config.cache):
        raise ValueError(
            f"blocks_ahead={config.blocks_ahead} opens blocks one by one: say block_length, and leave out suffix_ids, "
            "which stand behind the last one, and cache, which is of all of them."
        )
    ways = ("editing_threshold", "revoke_threshold", "remdm")
    said = [f"{name}={value!r}" for name in ways if (value := getattr(config, name)) is not None]
    if len(said) > 1:
        raise ValueError(f"{' and '.join(said)} both change what is committed; give one of them.")
    if said and (config.sub_block_length or config.sub_block_cache or config.prompt_first):
        raise ValueError(
            f"{said[0]} looks at a whole block until nothing changes; say sub_block_length=None, sub_block_cache=False "
            "and prompt_first=False."
        )
