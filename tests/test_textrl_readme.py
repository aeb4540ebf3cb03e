"""What TextRL 0.2.15's README tells users to type runs to the end on `textrl_swarm` instead of `textrl`.

The statements below are that README's, argument for argument (https://github.com/voidful/TextRL/tree/0.2.15);
only the first word of the import differs. They are executed as text. On 0.2.15 itself none of the examples
ends (textrl issues 9, 12, 21, 25, 27). Around them stands what a test machine lacks: the three hub ids are
tiny models in the hub's local cache, `.cuda()` leaves a model where it is, and petals' default peers are
servers of this machine.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import textwrap
from pathlib import Path

import pytest
import torch
from architectures import character_tokenizer, tiny_model
from stock_client import end
from transformers import AutoModelForCausalLM

from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.textrl.agent import PPOAgent

IMPORTS = """
import pfrl
from textrl_swarm import TextRLEnv, TextRLActor, train_agent_with_evaluation
from transformers import AutoModelForCausalLM, AutoTokenizer
"""
LOAD = """
checkpoint = "{checkpoint}"

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype="auto", device_map="auto")

model = model.cuda()
"""
REWARD = """
class MyRLEnv(TextRLEnv):
    def get_reward(self, input_item, predicted_list, finish):
        reward = [0]
        if finish:
            reward = [1]
        return reward
"""
TRAIN = """
observaton_list = [{"input":"explain how attention work in seq2seq model"}]
env = TextRLEnv(model, tokenizer, observation_input=observaton_list, max_length=20, compare_sample=2)
actor = TextRLActor(env, model, tokenizer,
                    act_deterministically=False,
                    temperature=1.0,
                    top_k=10,
                    top_p=1.0,
                    repetition_penalty=2)
agent = actor.agent_ppo(update_interval=2, minibatch_size=2, epochs=10)
print(actor.predict(observaton_list[0]))

train_agent_with_evaluation(
    agent,
    env,
    steps=100,
    eval_n_steps=None,
    eval_n_episodes=1,
    eval_interval=2,
    outdir='bloom—test',
)

print(actor.predict(observaton_list[0]))
"""
PETALS = """
import pfrl
from textrl_swarm import TextRLEnv, TextRLActor, train_agent_with_evaluation
from transformers import BloomTokenizerFast
from petals import DistributedBloomForCausalLM

MODEL_NAME = "bigscience/bloom-petals"
tokenizer = BloomTokenizerFast.from_pretrained(MODEL_NAME)
model = DistributedBloomForCausalLM.from_pretrained(MODEL_NAME)
model = model.cuda()
"""
KEY_PARAMETERS = """
actor = TextRLActor(env, model, tokenizer,
                    act_deterministically=False,
                    temperature=1,
                    compare_sample=2,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=2)
"""
UNBOUND_REWARD = """
class MyRLEnv(TextRLEnv):
    def get_reward(self, input_item, predicted_list, finish):
        if finish:
            reward = [0]
        return reward
"""
PREPARE = """
observaton_list = [{"input":'testing sent 1'},{"input":'testing sent 2'}]
env = MyRLEnv(model, tokenizer, observation_input=observaton_list)
actor = TextRLActor(env, model, tokenizer)
agent = actor.agent_ppo(update_interval=10, minibatch_size=2000, epochs=20)
"""
MANUAL_LOOP = """
n_episodes = 1000
max_episode_len = 200

for i in range(1, n_episodes + 1):
    obs = env.reset()
    R = 0
    t = 0
    while True:
        action = agent.act(obs)
        obs, reward, done, pred = env.step(action)
        R += reward
        t += 1
        reset = t == max_episode_len
        agent.observe(obs, reward, done, reset)
        if done or reset:
            break
    if i % 10 == 0:
        print('episode:', i, 'R:', R)
    if i % 50 == 0:
        print('statistics:', agent.get_statistics())
print('Finished.')
"""
SECOND_RECIPE = """
import logging
import sys

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='')

train_agent_with_evaluation(
    agent,
    env,
    steps=1000,
    eval_n_steps=None,
    eval_n_episodes=1500,
    train_max_episode_len=50,
    eval_interval=10000,
    outdir='somewhere',
)
"""
PREDICT = """
agent.load("somewhere/best")
actor.predict("input text")
"""
# Only so that a test ends today: (as the README has it, here).
SHORTER = [
    ("n_episodes = 1000", "n_episodes = 50"),
    ("max_episode_len = 200", "max_episode_len = 20"),
    ("steps=1000,", "steps=100,"),
    ("eval_n_episodes=1500", "eval_n_episodes=3"),
]


def type_in(world: dict, *snippets: str, **values: str) -> dict:
    """Executes snippets one after the other in the same namespace, as a user pastes them."""
    for snippet in snippets:
        for name, value in values.items():
            snippet = snippet.replace(f"{{{name}}}", value)
        for written, here in SHORTER:
            snippet = snippet.replace(written, here)
        exec(compile(textwrap.dedent(snippet), "README", "exec"), world)
    return world


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Tiny models under the names that the README uses, in the hub's local cache."""
    source = tmp_path_factory.mktemp("models")
    tiny_model("gpt2", n_positions=256).save_pretrained(source / "gpt2")
    character_tokenizer().save_pretrained(source / "gpt2")
    random_bloom(source / "bloomz", seed=8, layers=2, hidden=32, vocab=64)
    in_fp16 = AutoModelForCausalLM.from_pretrained(source / "bloomz", dtype=torch.float16)
    in_fp16.save_pretrained(source / "bloomz")  # fp16 as on the hub
    random_bloom(source / "bloom", seed=9, layers=2, hidden=32, vocab=64)
    for repository, directory in (
        ("gpt2", "gpt2"),
        ("bigscience/bloomz-7b1-mt", "bloomz"),
        ("bigscience/bloom", "bloom"),
    ):
        put_in_cache(repository, source / directory)
    put_in_cache("bigscience/bloom-petals", source / "bloom")
    return source


def put_in_cache(repository: str, source: Path) -> None:
    """As after a download."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    root = Path(os.environ["HF_HOME"], "hub", "models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    (root / "snapshots").mkdir(exist_ok=True)
    if not (root / "snapshots" / revision).exists():
        (root / "snapshots" / revision).symlink_to(source)


@pytest.fixture
def world(hub, tmp_path, monkeypatch):
    """An empty namespace, an empty directory, no CUDA to be sent to."""
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, device=None: self)
    torch.manual_seed(0)
    return {}


def assert_trained(world: dict, printed: str, steps: int, outdir: str = "bloom—test") -> None:
    agent: PPOAgent = world["agent"]
    assert agent.ppo.num_updates > 0 and agent.ppo.num_skipped == 0
    for parameter in agent.policy.trainable_parameters().values():
        assert torch.isfinite(parameter).all()
    assert any(bool(p.any()) for name, p in agent.policy.adapter_parameters().items() if "lora_B" in name), (
        "the adapter was never changed"
    )
    said = [eval(line) for line in printed.splitlines() if line.startswith("[")]
    assert len(said) == 2 and all(
        len(texts) == 2 and all(isinstance(text, str) for text in texts) for texts in said
    )
    names = os.listdir(outdir)
    assert {"best", "scores.txt"} <= set(names) and any(name.endswith("_finish") for name in names)
    assert (
        max(int(line.split("\t")[0]) for line in Path(outdir, "scores.txt").read_text().splitlines()[1:])
        >= steps
    )


@pytest.mark.parametrize("checkpoint", ["gpt2", "bigscience/bloomz-7b1-mt"])
def test_examples_1_and_2(world, capsys, caplog, checkpoint):
    type_in(world, IMPORTS, LOAD, REWARD, TRAIN, checkpoint=checkpoint)
    assert_trained(world, capsys.readouterr().out, 100)
    assert "get_reward is not overridden" in caplog.text  # the README makes a TextRLEnv and not its MyRLEnv


def test_examples_1_with_the_environment_that_it_means(world, capsys, caplog):
    type_in(
        world, IMPORTS, LOAD, REWARD, TRAIN.replace("env = TextRLEnv(", "env = MyRLEnv("), checkpoint="gpt2"
    )
    assert_trained(world, capsys.readouterr().out, 100)
    assert "a list of one for 2 samples" in caplog.text
    scores = [
        float(line.split("\t")[3]) for line in Path("bloom—test", "scores.txt").read_text().splitlines()[1:]
    ]
    assert len(scores) > 1 and set(scores) == {1.0}  # [1] at the end, and both samples get it


@pytest.mark.slow  # starts of servers
@pytest.mark.swarm
def test_example_3(world, hub, capsys, monkeypatch):
    """The prompt alone has more tokens than max_length: on 0.2.15 that was an error of petals."""
    with LocalSwarm("bigscience/bloom", num_servers=1) as swarm:
        from petals import DistributedBloomForCausalLM as Model

        from_pretrained = functools.partial(Model.from_pretrained, initial_peers=swarm.initial_peers)
        # Without initial_peers petals would ask the public swarm.
        monkeypatch.setattr(Model, "from_pretrained", from_pretrained)
        type_in(world, PETALS, REWARD, TRAIN)
        assert_trained(world, capsys.readouterr().out, 100)
        assert len(world["env"]._prompt_ids) > 20
        end(world["model"])


def test_key_parameters(world):
    type_in(world, IMPORTS, LOAD, REWARD, PREPARE, checkpoint="gpt2")
    world["actor"].policy.close()
    type_in(world, KEY_PARAMETERS)
    assert world["actor"].sampling.repetition_penalty == 2 and not world["actor"].act_deterministically


@pytest.mark.slow  # half a minute
def test_usage_with_the_manual_loop(world, capsys, caplog):
    type_in(world, IMPORTS, LOAD, UNBOUND_REWARD, PREPARE, MANUAL_LOOP, checkpoint="gpt2")
    printed = capsys.readouterr().out
    assert (
        "episode: 10 R: 0" in printed
        and "statistics: [('average_value', " in printed
        and printed.endswith("Finished.\n")
    )
    assert "unset before the end of a response; that counts as 0" in caplog.text
    assert world["agent"].ppo.num_updates == 50  # one per episode: they are longer than update_interval


def test_usage_with_the_second_recipe(world, capsys, caplog):
    with caplog.at_level(logging.INFO):
        type_in(
            world,
            IMPORTS,
            LOAD,
            UNBOUND_REWARD,
            PREPARE,
            SECOND_RECIPE,
            PREDICT,
            checkpoint="bigscience/bloomz-7b1-mt",
        )
    assert "outdir:somewhere step:" in caplog.text and "statistics:[" in caplog.text
    assert {"best", "scores.txt"} <= set(os.listdir("somewhere"))
    assert len(world["actor"].predict({"input": "input text"})) == 2


def test_predict_before_there_is_an_agent(world):
    type_in(
        world,
        IMPORTS,
        LOAD,
        REWARD,
        "env = MyRLEnv(model, tokenizer, observation_input=[{'input': 'a'}])",
        checkpoint="gpt2",
    )
    type_in(world, "actor = TextRLActor(env, model, tokenizer)\ntexts = actor.predict('input text')")
    assert len(world["texts"]) == 2


NOTEBOOK = """
class MyRLEnv(TextRLEnv):
    def get_reward(self, input_item, predicted_list, finish):
        reward = 0
        if finish or len(predicted_list) >= self.env_max_length:
            predicted_text = tokenizer.convert_tokens_to_string(predicted_list[0])
            reward = sentiment(input_item['input']+predicted_text)[0][0]['score']*10
        return reward

observaton_list = [{'input':'i think dogecoin is'}]
env = MyRLEnv(model, tokenizer, observation_input=observaton_list, compare_sample=1)
actor = TextRLActor(env, model, tokenizer)
agent = actor.agent_ppo(update_interval=100, minibatch_size=3, epochs=10)
before = actor.predict(observaton_list[0])
pfrl.experiments.train_agent_with_evaluation(
    agent,
    env,
    steps=300,
    eval_n_steps=None,
    eval_n_episodes=1,
    train_max_episode_len=100,
    eval_interval=10,
    outdir='elon_musk_dogecoin',
)
agent.load("./elon_musk_dogecoin/best")
after = actor.predict(observaton_list[0])
"""


def test_example_4_the_notebook(world):
    """Scalar rewards from a classifier, one sample, pfrl's own training function."""
    world["sentiment"] = lambda text: [[{"label": "LABEL_0", "score": text.count("e") / len(text)}]]
    type_in(world, IMPORTS, LOAD, NOTEBOOK, checkpoint="gpt2")
    assert len(world["before"]) == len(world["after"]) == 1
    assert {"best", "scores.txt", "300_finish"} <= set(os.listdir("elon_musk_dogecoin"))


@pytest.mark.slow  # a fresh process
def test_what_was_trained_can_be_dumped(world, monkeypatch, capsys):
    cli = pytest.importorskip("textrl_swarm.cli")
    type_in(world, IMPORTS, LOAD, REWARD, TRAIN, checkpoint="gpt2")
    with load_policy("gpt2") as policy, torch.no_grad():
        policy.load_adapter("bloom—test/best")
        tokens = torch.tensor([[5, 6, 7, 8]])
        expected = policy(tokens).logits
    monkeypatch.setattr(
        "sys.argv", ["textrl-dump", "--model", "gpt2", "--rl", "bloom—test/best", "--dump", "output_dir"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.dump()
    assert ended.value.code in (0, None)
    dumped = AutoModelForCausalLM.from_pretrained("output_dir")
    with torch.no_grad():
        assert torch.allclose(dumped(tokens).logits, expected, atol=1e-4)
    assert json.loads(Path("output_dir/config.json").read_text())["model_type"] == "gpt2"
