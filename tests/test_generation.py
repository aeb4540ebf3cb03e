"""Rollouts: transformers' `generate` gives the same tokens, a plain forward the same scores."""

import math
from contextlib import contextmanager

import pytest
import torch
from architectures import ARCHITECTURES, EOS, PAD, VOCAB, character_tokenizer, perturb, tiny_model

from textrl_swarm.config import SamplingConfig
from textrl_swarm.errors import NumericsError, PromptError
from textrl_swarm.policies.loading import load_policy

PROMPTS = [[5, 9, 12, 7, 30, 21, 8], [17], [4, 4, 31], [22, 40, 3, 11]]


def policy_of(architecture="llama", trained=True, tokenizer=True):
    """Output embeddings of their own: with tied ones a random model repeats its last token for ever."""
    policy = load_policy(
        tiny_model(architecture, tie_word_embeddings=False),
        tokenizer=character_tokenizer() if tokenizer else None,
    )
    if trained:
        perturb(policy)
    return policy


def responses(rollout):
    """One list of token ids per row."""
    return [
        rollout.tokens[i, p : p + n].tolist()
        for i, (p, n) in enumerate(
            zip(rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist(), strict=True)
        )
    ]


def ending_with(policy, token):
    """Makes `token` the end token, so that a test can choose where responses end."""
    policy.tokenizer.add_special_tokens({"eos_token": policy.tokenizer.convert_ids_to_tokens(token)})
    policy.generation_config.eos_token_id = token
    return policy


# Greedy: transformers' own `generate`


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_transformers_generate(architecture):
    """The oracle gets one prompt at a time; we get all of them, of unequal length, in one session."""
    policy, new = policy_of(architecture, trained=False), 16
    rollout = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=new, do_sample=False))
    policy.close()
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = policy._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
        )
        assert responses(rollout)[row] == expected[0, len(prompt) :].tolist()
    # Not one token over and over.
    assert len({token for response in responses(rollout) for token in response}) > 8


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_greedy_with_an_adapter_is_transformers_generate(architecture):
    policy = policy_of(architecture)
    rollout = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=12, do_sample=False))
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = policy._peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        assert responses(rollout)[row] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.3, 4.0, 0.5])
def test_greedy_with_a_repetition_penalty_is_transformers_generate(penalty):
    policy = policy_of(trained=False)
    rollout = policy.generate(
        PROMPTS, SamplingConfig(max_new_tokens=12, do_sample=False, repetition_penalty=penalty)
    )
    plain = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=12, do_sample=False))
    assert responses(rollout) != responses(plain)
    policy.close()
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = policy._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=penalty,
        )
        assert responses(rollout)[row] == expected[0, len(prompt) :].tolist()


# The scores are those of a plain forward

FILTERED = {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "repetition_penalty": 2.0}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{}, FILTERED], ids=["plain", "filtered"])
def test_logprobs_and_values_are_those_of_the_whole_sequence(architecture, settings):
    policy = policy_of(architecture)
    with torch.no_grad():
        policy.value_head.weight.mul_(30)  # so that values differ from place to place
    rollout = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=11, num_samples=2, seed=3, **settings))
    assert rollout.temperature == settings.get("temperature", 1.0)
    with torch.no_grad():
        out = policy(rollout.tokens)
    compared = 0
    for row, response in enumerate(responses(rollout)):
        for t, token in enumerate(response):
            state = int(rollout.prompt_lengths[row]) + t - 1  # the state in which the t-th token was chosen
            expected = torch.log_softmax(out.logits[row, state] / rollout.temperature, dim=-1)[token]
            assert rollout.old_logprobs[row, t].item() == pytest.approx(expected.item(), abs=1e-4)
            assert rollout.values[row, t].item() == pytest.approx(out.values[row, state].item(), abs=1e-4)
            compared += 1
    assert compared > 40
    assert out.values.std() > 0.1
    assert (
        not rollout.old_logprobs[~rollout.response_mask].any()
        and not rollout.values[~rollout.response_mask].any()
    )


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_filters_reach_the_draw(settings):
    policy = policy_of()
    greedy = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=10, do_sample=False))
    filtered = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=10, seed=1, **settings))
    plain = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=10, seed=1))
    assert responses(filtered) == responses(greedy) != responses(plain)


def test_greedy_logprobs_are_of_the_stated_temperature():
    policy = policy_of()
    cold, warm = (
        policy.generate(PROMPTS, SamplingConfig(max_new_tokens=5, do_sample=False, temperature=t))
        for t in (0.5, 1.0)
    )
    assert torch.equal(cold.tokens, warm.tokens)
    assert (cold.old_logprobs > warm.old_logprobs)[warm.response_mask].all()


def test_filters_off_leave_the_distribution_as_it_is():
    """Chi-squared test of the first token's frequencies against the softmax of a plain forward.

    The second token is tested in the same way, given the first.
    """
    policy, rows = policy_of(tokenizer=False), 20_000
    rollout = policy.generate(
        [[5, 9]],
        SamplingConfig(max_new_tokens=2, num_samples=rows, top_k=0, top_p=1.0, temperature=1.5, seed=0),
    )
    first, second = rollout.tokens[:, 2], rollout.tokens[:, 3]
    common = int(first.mode().values)
    with torch.no_grad():
        logits = policy(torch.tensor([[5, 9, common]])).logits[0] / 1.5
    for chosen, expected in (
        (first, logits[1].softmax(-1)),
        (second[first == common], logits[2].softmax(-1)),
    ):
        counts, expected = torch.bincount(chosen, minlength=VOCAB).double(), expected.double() * len(chosen)
        often = expected >= 5
        cells = torch.cat([((counts - expected).square() / expected)[often], torch.zeros(0)])
        assert often.sum() > 10
        degrees = len(cells) - 1
        assert cells.sum().item() < degrees + 5 * math.sqrt(2 * degrees)
        rare = expected[~often].sum().item()
        assert abs(counts[~often].sum().item() - rare) < 5 * math.sqrt(rare + 1)


# Where responses end


@pytest.mark.parametrize("sampled", [True, False])
def test_nothing_after_the_end_token(sampled):
    policy, settings = (
        policy_of(),
        SamplingConfig(max_new_tokens=12, do_sample=sampled, temperature=2.0, num_samples=3, seed=5),
    )
    free = responses(ending_with(policy, EOS).generate(PROMPTS, settings))
    end = max(range(3, VOCAB), key=lambda token: sum(token in response for response in free))
    rollout = ending_with(policy, end).generate(PROMPTS, settings)
    ended = 0
    for row, (response, uncut) in enumerate(zip(responses(rollout), free, strict=True)):
        # The end token included, and the same tokens up to it.
        expected = uncut[: uncut.index(end) + 1] if end in uncut else uncut
        if uncut[-1] != EOS:
            assert response == expected
        assert response.count(end) == int(rollout.terminated[row])
        assert bool(rollout.terminated[row]) == (response[-1] == end)
        assert rollout.terminated[row] or len(response) == 12
        used = int(rollout.prompt_lengths[row]) + len(response)
        assert (rollout.tokens[row, used:] == PAD).all()
        assert rollout.response_mask[row].tolist() == [True] * len(response) + [False] * (
            rollout.response_mask.shape[1] - len(response)
        )
        ended += int(rollout.terminated[row])
    assert 0 < ended < len(rollout)


def test_end_token_as_the_first_choice():
    policy = policy_of()
    first = responses(policy.generate([[17], [4, 4, 31]], SamplingConfig(max_new_tokens=1, do_sample=False)))[
        0
    ][0]
    rollout = ending_with(policy, first).generate([[17]], SamplingConfig(max_new_tokens=9, do_sample=False))
    assert (
        rollout.tokens.tolist() == [[17, first]]
        and rollout.response_mask.tolist() == [[True]]
        and rollout.terminated.tolist() == [True]
    )
    assert rollout.old_logprobs.shape == rollout.values.shape == (1, 1)


def test_separator_token_ends_a_response_too():
    policy = policy_of()
    uncut = responses(policy.generate([[17]], SamplingConfig(max_new_tokens=6, do_sample=False)))[0]
    policy.tokenizer.sep_token = policy.tokenizer.convert_ids_to_tokens(uncut[2])
    rollout = policy.generate([[17]], SamplingConfig(max_new_tokens=6, do_sample=False))
    assert responses(rollout)[0] == uncut[: uncut.index(uncut[2]) + 1] and rollout.terminated.tolist() == [
        True
    ]


@pytest.mark.parametrize("new", [1, 2, 7])
def test_at_most_max_new_tokens(new):
    rollout = policy_of(tokenizer=False).generate(
        PROMPTS, SamplingConfig(max_new_tokens=new, do_sample=False)
    )
    assert rollout.response_lengths.tolist() == [new] * 4 and rollout.response_mask.shape == (4, new)


def test_shapes_are_trimmed_to_what_was_used():
    policy = policy_of()
    uncut = responses(policy.generate([PROMPTS[0], [17]], SamplingConfig(max_new_tokens=20, do_sample=False)))
    common = next(token for token in uncut[0] if token in uncut[1])
    rollout = ending_with(policy, common).generate(
        [PROMPTS[0], [17]], SamplingConfig(max_new_tokens=20, do_sample=False)
    )
    lengths = [len(response) for response in responses(rollout)]
    assert lengths == [response.index(common) + 1 for response in uncut] and max(lengths) < 20
    width = max(lengths)
    assert rollout.tokens.shape == (2, max(7 + lengths[0], 1 + lengths[1]))
    assert rollout.response_mask.shape == rollout.old_logprobs.shape == rollout.values.shape == (2, width)
    assert rollout.prompt_lengths.tolist() == [7, 1] and len(rollout) == len(rollout.texts) == 2
    assert rollout.tokens.dtype == rollout.prompt_lengths.dtype == torch.int64
    assert rollout.response_mask.dtype == rollout.terminated.dtype == torch.bool
    assert rollout.old_logprobs.dtype == rollout.values.dtype == torch.float32
    assert not rollout.old_logprobs.requires_grad and not rollout.values.requires_grad


def test_prompts_stand_at_the_start_of_their_rows():
    rollout = policy_of().generate(PROMPTS, SamplingConfig(max_new_tokens=5, num_samples=2, seed=0))
    for row in range(len(rollout)):
        assert rollout.tokens[row, : rollout.prompt_lengths[row]].tolist() == PROMPTS[row // 2]


# What shares a session changes nothing


def counted_sessions(policy, monkeypatch):
    """Rows of each session from now on, and the shape of each step's tokens."""
    sessions, original = [], policy.session

    @contextmanager
    def session(rows, max_length):
        with original(rows, max_length) as inner:
            sessions.append({"rows": rows, "max_length": max_length, "fed": []})

            class Counted:
                def run(self, steps, own=sessions[-1]):
                    own["fed"] += [tuple(step.inputs.shape) for step in steps]
                    return inner.run(steps)

            yield Counted()

    monkeypatch.setattr(policy, "session", session)
    return sessions


@pytest.mark.parametrize("limit", [17, 30, 40, 68, 10_000])
@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"seed": 4, "temperature": 1.5, "num_samples": 2}],
    ids=["greedy", "sampled"],
)
def test_grouping_changes_nothing(limit, settings, monkeypatch):
    policy, sampling = ending_with(policy_of(), 47), SamplingConfig(max_new_tokens=10, **settings)
    together = policy.generate(PROMPTS, sampling)
    sessions = counted_sessions(policy, monkeypatch)
    monkeypatch.setattr(policy, "max_session_tokens", limit)
    grouped = policy.generate(PROMPTS, sampling)
    assert sum(session["rows"] for session in sessions) == len(together)
    assert all(session["rows"] * session["max_length"] <= limit for session in sessions)
    assert (len(sessions) == 1) == (limit == 10_000 or (limit == 68 and len(together) == 4))
    assert torch.equal(grouped.tokens, together.tokens) and torch.equal(
        grouped.response_mask, together.response_mask
    )
    assert torch.equal(grouped.terminated, together.terminated) and grouped.texts == together.texts
    torch.testing.assert_close(grouped.old_logprobs, together.old_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(grouped.values, together.values, rtol=0, atol=1e-5)


def test_row_order_changes_nothing():
    policy, sampling = policy_of(), SamplingConfig(max_new_tokens=10, do_sample=False)
    forward, backward = policy.generate(PROMPTS, sampling), policy.generate(PROMPTS[::-1], sampling)
    assert responses(forward) == responses(backward)[::-1]
    torch.testing.assert_close(forward.old_logprobs, backward.old_logprobs.flip(0), rtol=0, atol=1e-5)


def test_other_rows_do_not_change_what_a_row_draws():
    policy, sampling = policy_of(), SamplingConfig(max_new_tokens=10, seed=6, temperature=1.5)
    alone = responses(policy.generate(PROMPTS[1:2], sampling))[0]
    assert responses(policy.generate([PROMPTS[1], *PROMPTS], sampling))[0] == alone
    assert responses(policy.generate([PROMPTS[1], [3] * 30], sampling))[0] == alone


def test_rows_are_fed_once_and_leave_when_they_have_ended(monkeypatch):
    policy = policy_of(tokenizer=False)
    uncut = responses(policy.generate([PROMPTS[0], [17]], SamplingConfig(max_new_tokens=20, do_sample=False)))
    sessions = counted_sessions(policy, monkeypatch)
    policy.generate([PROMPTS[0], PROMPTS[2], PROMPTS[3]], SamplingConfig(max_new_tokens=4, do_sample=False))
    common = next(token for token in uncut[0] if token in uncut[1])
    lengths = [response.index(common) + 1 for response in uncut]
    assert max(lengths) < 20
    policy.tokenizer = character_tokenizer()
    ending_with(policy, common).generate(
        [PROMPTS[0], [17]], SamplingConfig(max_new_tokens=20, do_sample=False)
    )
    # The prompts at once, then token by token; the last token chosen is fed to nobody.
    assert sessions[0] == {"rows": 3, "max_length": 7 + 4, "fed": [(3, 7)] + [(3, 1)] * 3}
    first, *others = sessions[1]["fed"]
    assert first == (2, 7) and sum(rows for rows, _ in others) == sum(lengths) - 2


# Seeds and samples


def test_same_seed_same_rollout():
    policy, sampling = policy_of(), SamplingConfig(max_new_tokens=8, num_samples=3, seed=7)
    first, again = policy.generate(PROMPTS, sampling), policy.generate(PROMPTS, sampling)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.old_logprobs, again.old_logprobs)
    other = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=8, num_samples=3, seed=8))
    assert responses(other) != responses(first)


def test_without_a_seed_the_global_generator_decides():
    policy, sampling = policy_of(), SamplingConfig(max_new_tokens=8)
    torch.manual_seed(3)
    first, second = policy.generate(PROMPTS, sampling), policy.generate(PROMPTS, sampling)
    torch.manual_seed(3)
    again = policy.generate(PROMPTS, sampling)
    assert torch.equal(first.tokens, again.tokens) and responses(first) != responses(second)


def test_samples_of_a_prompt_stand_together_and_differ():
    rollout = policy_of().generate(
        PROMPTS[:2], SamplingConfig(max_new_tokens=8, num_samples=3, temperature=1.5, seed=0)
    )
    assert rollout.prompt_lengths.tolist() == [7, 7, 7, 1, 1, 1]
    found = responses(rollout)
    assert (
        len({tuple(response) for response in found[:3]})
        == len({tuple(response) for response in found[3:]})
        == 3
    )


def test_greedy_samples_are_equal():
    found = responses(
        policy_of().generate([[17]], SamplingConfig(max_new_tokens=6, do_sample=False, num_samples=3))
    )
    assert found[0] == found[1] == found[2]


# Texts


def test_texts_are_the_decoded_responses():
    policy = policy_of()
    rollout = policy.generate(
        ["hello there", "a"], SamplingConfig(max_new_tokens=9, num_samples=2, seed=1, temperature=1.5)
    )
    tokenizer = character_tokenizer()
    assert rollout.prompt_lengths.tolist() == [11, 11, 1, 1]
    assert rollout.tokens[0, :11].tolist() == tokenizer("hello there")["input_ids"]
    for text, response in zip(rollout.texts, responses(rollout), strict=True):
        assert text == "".join(tokenizer.convert_ids_to_tokens([token for token in response if token > 2]))


def test_the_end_token_is_not_in_the_text():
    policy = policy_of()
    uncut = responses(policy.generate([[17]], SamplingConfig(max_new_tokens=6, do_sample=False)))[0]
    rollout = ending_with(policy, uncut[2]).generate(
        [[17]], SamplingConfig(max_new_tokens=6, do_sample=False)
    )
    cut = uncut[: uncut.index(uncut[2])]
    assert rollout.texts == ("".join(policy.tokenizer.convert_ids_to_tokens(cut)),)


def test_texts_and_their_token_ids_are_the_same_prompts():
    policy, sampling = policy_of(), SamplingConfig(max_new_tokens=6, seed=2)
    ids = character_tokenizer()(["go on", "yes"])["input_ids"]
    by_text = policy.generate(["go on", "yes"], sampling)
    for prompts in (
        ids,
        tuple(map(tuple, ids)),
        [torch.tensor(row) for row in ids],
        [torch.tensor(row).numpy() for row in ids],
    ):
        rollout = policy.generate(prompts, sampling)
        assert torch.equal(rollout.tokens, by_text.tokens) and rollout.texts == by_text.texts


def test_without_a_tokenizer_token_ids_do():
    policy = policy_of(tokenizer=False)
    rollout = policy.generate([[17], [4, 4, 31]], SamplingConfig(max_new_tokens=5, do_sample=False))
    assert (
        rollout.response_lengths.tolist() == [5, 5]
        and rollout.texts == ("", "")
        and not rollout.terminated.any()
    )


def test_a_padding_token_without_an_embedding_is_not_used():
    policy = policy_of()
    uncut = responses(policy.generate(PROMPTS, SamplingConfig(max_new_tokens=12, do_sample=False)))
    ending_with(policy, uncut[1][3]).tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert policy.tokenizer.pad_token_id == VOCAB
    rollout = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=12, do_sample=False))
    assert rollout.tokens.max() < VOCAB
    policy(rollout.tokens)


# Refusals


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the prompt list is empty; give at least one prompt"),
        (
            "hello",
            r"prompts must be a list of texts or of token-id lists, got str; wrap a single prompt in \[ \]",
        ),
        (b"hello", "prompts must be a list .* got bytes"),
        (None, "prompts must be a list .* got NoneType"),
        (torch.tensor([[1, 2]]), "prompts must be a list .* got Tensor"),
        ({"input": "x"}, "prompts must be a list .* got dict"),
        (["hello", ""], r"prompt 1 is empty \(''\); a policy needs at least one token to continue"),
        ([[5], []], r"prompt 1 is empty \(\[\]\)"),
        ([5, 6], "prompt 0 is neither a text nor a list of token ids: 5"),
        ([None], "prompt 0 is neither a text nor a list of token ids: None"),
        ([[5], [1.5, 2.0]], r"prompt 1 is neither a text nor a list of token ids: \[1\.5, 2\.0\]"),
        ([["5", "6"]], r"prompt 0 is neither a text nor a list of token ids: \['5', '6'\]"),
        ([[[5, 6]]], r"prompt 0 is neither a text nor a list of token ids: \[\[5, 6\]\]"),
        ([b"hello"], "prompt 0 is neither a text nor a list of token ids: b'hello'"),
        ([{"input": "x"}], "prompt 0 is neither a text nor a list of token ids: {'input': 'x'}"),
        ([[5], [3, VOCAB]], r"prompt 1 has token id 48, outside the model's 0\.\.47"),
        ([[-1]], r"prompt 0 has token id -1, outside the model's 0\.\.47"),
        (
            [[5], [3] * 60],
            "prompt 1 has 60 tokens; with max_new_tokens=10 that makes 70, "
            "but the model allows 64: shorten the prompt",
        ),
    ],
)
def test_refused_prompts(prompts, message):
    policy = policy_of("gpt2")
    with pytest.raises(PromptError, match=message):
        policy.generate(prompts, SamplingConfig(max_new_tokens=10, num_samples=2))


def test_texts_need_a_tokenizer():
    with pytest.raises(
        PromptError,
        match=r"this policy has no tokenizer: pass token ids, or load_policy\(\.\.\., tokenizer=\.\.\.\)",
    ):
        policy_of("gpt2", tokenizer=False).generate(["hello"])


def test_a_sequence_may_fill_the_model(monkeypatch):
    """64 positions: 54 + 10 fit, 55 + 10 do not; a session limit below that counts too."""
    policy, sampling = policy_of("gpt2", tokenizer=False), SamplingConfig(max_new_tokens=10, do_sample=False)
    rollout = policy.generate([[5] * 54], sampling)
    assert rollout.tokens.shape == (1, 64)
    policy(rollout.tokens)
    with pytest.raises(PromptError, match="that makes 65, but the model allows 64"):
        policy.generate([[5] * 55], sampling)
    monkeypatch.setattr(policy, "max_session_tokens", 20)
    policy.generate([[5] * 10] * 3, sampling)
    with pytest.raises(
        PromptError,
        match="prompt 0 has 11 tokens; with max_new_tokens=10 that makes 21, but the model allows 20",
    ):
        policy.generate([[5] * 11], sampling)


# Numbers that are none


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_logits_that_are_no_numbers_end_sampling_with_our_error(bad):
    """Whichever filter the logits pass first: a NaN must not become a token."""
    with policy_of() as policy:
        with torch.no_grad():
            for name, parameter in policy.adapter_parameters().items():
                if "down_proj" in name and "layers.2" in name:
                    parameter.fill_(bad)
        filters = {"top_k": 3, "top_p": 0.5, "repetition_penalty": 2.0, "temperature": 0.1}
        for settings in ({}, *({name: value} for name, value in filters.items()), filters):
            for do_sample in (True, False):
                sampling = SamplingConfig(max_new_tokens=3, do_sample=do_sample, seed=1, **settings)
                with pytest.raises(
                    NumericsError, match=r"hold NaN, \+inf .* so no token can be drawn: the weights or"
                ):
                    policy.generate(["ab"], sampling)
