"""The code behind the demo model, on hand-made input."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from capture.demo import evaluate
from capture.demo.corpus import (
    cap_bytes,
    cut_blocks,
    cut_pieces,
    is_held_out,
    split_documents,
    strip_html,
)
from capture.demo.evaluate import masked_expert, measure_harm
from capture.demo.model import (
    list_snapshots,
    random_model,
    read_stages,
    save_weights,
    sorted_experts,
)
from capture.demo.routing import (
    Windows,
    balance,
    cluster_router,
    domain_counts,
    histograms,
    information,
    observe,
    routers,
    window_accuracy,
    window_losses,
)
from capture.demo.sources import DOMAIN_NAMES, DOMAINS, PACKAGES, unpack
from capture.demo.streams import (
    LONG_EVERY,
    LONG_WINDOW,
    WINDOW,
    WindowSampler,
    cut_windows,
    domain_order,
)
from capture.demo.train import Recipe, Trainer, balance_loss

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products: on a busy machine a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    made = random_model(0)
    return made.train(False)


class TestExtraction:
    def test_strip_html(self):
        page = "<head>x</head><p>A &lt;b&gt;&nbsp; c<br>d</p><script>no()</script><li>e</li>\n\n f"
        assert strip_html(page) == "A <b> c\nd\ne\nf"

    def test_blocks_join_again(self):
        text = "\n".join(f"line {i}" for i in range(100))
        blocks = cut_blocks(text, size=50)
        assert "\n".join(blocks) == text
        assert all(len(block) + 1 >= 50 for block in blocks[:-1])

    def test_every_domain_has_packages(self):
        folders = {package.folder for package in PACKAGES}
        assert len(set(DOMAIN_NAMES)) == 19
        assert all(set(domain.packages) <= folders for domain in DOMAINS)

    def test_unpack(self, tmp_path):
        import tarfile
        import zipfile

        (tmp_path / "a.txt").write_text("a")
        with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
            tar.add(tmp_path / "a.txt", "package/a.txt")
        with zipfile.ZipFile(tmp_path / "y.whl", "w") as wheel:
            wheel.write(tmp_path / "a.txt", "y/a.txt")
        for name in ("x.tgz", "y.whl"):
            unpack(tmp_path / name, tmp_path / "out")
        assert (tmp_path / "out/package/a.txt").read_text() == "a"
        assert (tmp_path / "out/y/a.txt").read_text() == "a"


class TestSplit:
    documents = tuple((f"key {i // 2}", f"text {i} " + "x" * 50) for i in range(2000))

    def test_no_key_on_two_sides(self):
        split = split_documents(self.documents)
        train, fit, heldout = (
            {document.key for document in part} for part in (split.train, split.fit, split.heldout)
        )
        assert train and fit and heldout
        assert not train & fit and not train & heldout and not fit & heldout
        assert not any(map(is_held_out, train)) and all(map(is_held_out, fit | heldout))
        assert {document.key for document in split.validation} <= fit | heldout

    def test_about_four_percent(self):
        share = np.mean([is_held_out(f"document {i}") for i in range(5000)])
        assert share == pytest.approx(0.04, abs=0.01)  # three standard errors are 0.008

    def test_more_training_changes_no_held_out_text(self):
        plain = split_documents(self.documents)
        more = split_documents(self.documents, [(f"more {i}", f"m {i}") for i in range(100)])
        assert len(more.train) > len(plain.train)
        assert more.validation == plain.validation

    def test_repeated_text_is_not_held_out(self):
        held_key = next(f"k{i}" for i in range(1000) if is_held_out(f"k{i}"))
        free_key = next(f"k{i}" for i in range(1000) if not is_held_out(f"k{i}"))
        split = split_documents([(held_key, "same"), (free_key, "same")])
        assert [d.text for d in split.train] == ["same"]
        assert not split.fit and not split.heldout

    def test_cap_keeps_the_last_whole(self):
        split = split_documents(self.documents)
        capped = cap_bytes(split.train, 100)
        assert capped == split.train[: len(capped)]
        assert sum(len(d.text.encode()) for d in capped[:-1]) < 100

    def test_pieces(self):
        text = "first\n\n" + "\u5c71" * 5000 + "\nlast\u2028line"
        pieces = cut_pieces(text, limit=200)
        assert max(len(piece.encode()) for piece in pieces) <= 200
        assert "".join(pieces).replace("\n", "") == text.replace("\n", "")


class TestBatches:
    def test_weight_is_the_share_of_rounds(self):
        order = domain_order([1.0, 0.6, 1.0], seed=0)
        drawn = [next(order) for _ in range(2600)]
        counts = np.bincount(drawn)
        assert counts[0] == pytest.approx(1000, abs=1)
        assert counts[1] == pytest.approx(600, abs=1)

    def test_restart_draws_the_same(self):
        streams = [np.arange(i, i + 2000, dtype=np.uint16) for i in range(len(DOMAINS))]
        options = {"batch": 3, "rank": 1, "world": 2, "seed": 5}
        through = WindowSampler(streams, **options)
        drawn = [through.draw() for _ in range(LONG_EVERY + 2)]
        again = WindowSampler(streams, **options, first_step=LONG_EVERY)
        assert all(torch.equal(again.draw(), batch) for batch in drawn[LONG_EVERY:])
        assert drawn[0].shape == (3, WINDOW + 1)

    def test_long_windows_take_about_as_many_tokens(self):
        streams = [np.arange(2000, dtype=np.uint16) for _ in DOMAINS]
        sampler = WindowSampler(streams, batch=8, rank=0, world=1, seed=5)
        shapes = [tuple(sampler.draw().shape) for _ in range(2 * LONG_EVERY)]
        short, long = (8, WINDOW + 1), (8 * WINDOW // LONG_WINDOW, LONG_WINDOW + 1)
        assert shapes == 2 * ([short] * (LONG_EVERY - 1) + [long])

    def test_processes_draw_different_windows(self):
        streams = [np.arange(2000, dtype=np.uint16) for _ in DOMAINS]
        one, two = (
            WindowSampler(streams, batch=3, rank=rank, world=2, seed=5).draw() for rank in (0, 1)
        )
        assert not torch.equal(one, two)

    def test_windows_cover_the_stream(self):
        windows = cut_windows(np.arange(4 * WINDOW + 1, dtype=np.uint16))
        assert windows[:, :-1].flatten().tolist() == list(range(4 * WINDOW))
        assert cut_windows(np.zeros(20 * WINDOW), limit=5).shape[0] == 5


class TestClusterRouter:
    def test_untrained_router_learns_to_tell_streams_apart(self):
        # two kinds of text of disjoint vocabularies, in equal parts
        random = np.random.default_rng(0)
        streams = [
            random.integers(low, low + 40, 30 * WINDOW + 1).astype(np.uint16) for low in (10, 900)
        ]
        model = random_model(3).train(False)
        windows = Windows(
            torch.cat([cut_windows(stream, 8) for stream in streams]), np.repeat([0, 1], 8)
        )
        told = [_told(model, windows, layer=1)]
        untouched = routers(model)[2].weight.clone()
        for share in (0.4, 1.0):
            turned = copy.deepcopy(model)
            cluster_router(turned, 1, streams, seed=0, share=share)
            told.append(_told(turned, windows, layer=1))
        assert told[0] < told[1] < told[2]
        assert told[2] > 2 * told[0]
        assert told[2] > 0.8  # of the one bit there is
        assert torch.equal(routers(turned)[2].weight, untouched)

    def test_clusters_go_to_the_experts_that_read_them(self):
        """A router of clusters stays as it is: every cluster finds its own expert again."""
        random = np.random.default_rng(0)
        streams = [
            random.integers(low, low + 60, 6 * WINDOW + 1).astype(np.uint16)
            for low in range(10, 6000, 375)
        ]
        model = random_model(3).train(False)
        cluster_router(model, 1, streams, seed=0, share=1.0)
        rows = routers(model)[1].weight.detach().clone()
        shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            routers(model)[1].weight.copy_(rows[shuffled])
        cluster_router(model, 1, streams, seed=0, share=0.5)
        torch.testing.assert_close(routers(model)[1].weight, rows[shuffled])


def _told(model, windows, *, layer):
    ids = observe(model, windows, "").expert_ids[layer]
    return information(domain_counts(ids, windows.domains, 16))


class TestModel:
    def test_sorted_experts_equal_the_stock_ones(self, model):
        experts = model.model.layers[0].mlp.experts
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(40, 128, generator=generator)
        # one expert stays without tokens
        ids = torch.stack([torch.randperm(15, generator=generator)[:2] for _ in range(40)])
        weights = torch.rand(40, 2, generator=generator)
        gradients = []
        outputs = []
        for forward in (sorted_experts, type(experts).forward.__wrapped__):
            rows = hidden.clone().requires_grad_()
            outputs.append(forward(experts, rows, ids, weights))
            (gradient,) = torch.autograd.grad(outputs[-1].square().sum(), rows)
            gradients.append(gradient)
        # float32 sums of 128 products in another order
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    def test_saved_weights_come_back(self, model, tmp_path):
        from transformers import AutoModelForCausalLM

        save_weights(model, tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.dtype is torch.bfloat16 and model.dtype is torch.float32
        first, second = (m.get_input_embeddings().weight for m in (model, again))
        assert torch.equal(first.to(torch.bfloat16), second)

    def test_published_values_of_the_routers_losses(self):
        # not bounded below by 1: two tokens choose expert 0 by a hair, one expert 1 for certain
        shares = torch.tensor([[[0.51, 0.49], [0.51, 0.49], [1e-12, 1.0]]])
        assert balance_loss(shares.log(), top_k=1)[0].item() == pytest.approx(0.8933, abs=5e-5)
        for experts, squared in ((8, 4.3241), (64, 17.2963)):
            _, z, _ = balance_loss(torch.zeros(2, 5, experts), top_k=2)
            assert z.item() == pytest.approx(squared, abs=5e-5)
        # all to one of E experts, with certainty
        collapsed = torch.full((1, 4, 8), -50.0)
        collapsed[..., 3] = 50
        assert balance_loss(collapsed, top_k=1)[0].item() == pytest.approx(8)

    def test_balance_loss(self):
        even = torch.eye(4).repeat(2, 8, 1) * 1e-6
        balanced, z, share = balance_loss(even, top_k=1)
        assert balanced.item() == pytest.approx(1, abs=1e-3)
        assert z.item() == pytest.approx(np.log(4) ** 2, rel=1e-3)
        assert share.tolist() == [[0.25] * 4] * 2
        collapsed, _, _ = balance_loss(torch.tensor([[[9.0, 0, 0, 0]]] * 2), top_k=1)
        assert collapsed.item() == pytest.approx(4, abs=0.01)

    def test_layers_cannot_cancel(self):
        """Two layers that collapse onto different experts are not balanced."""
        logits = torch.tensor([[[9.0, 0]], [[0, 9.0]]])
        assert balance_loss(logits, top_k=1)[0].item() > 1.9


class TestRouting:
    def test_information(self):
        assert information(np.eye(4)) == pytest.approx(2)
        assert information(np.ones((4, 3))) == pytest.approx(0)

    def test_counts_and_balance(self):
        ids = np.array([[0, 1], [0, 1], [2, 2]], dtype=np.uint8)
        counts = domain_counts(ids, np.array([0, 0, 1]), experts=4)
        assert counts.tolist() == [[2, 2, 0, 0], [0, 0, 2, 0]]
        figures = balance(counts)
        assert figures["max_load"] == pytest.approx(2)
        assert figures["max_violation"] == pytest.approx(1)
        assert figures["dead_experts"] == 1
        assert figures["normalized_entropy"] == pytest.approx(0.75)

    def test_window_accuracy(self):
        domains = np.repeat([0, 1], 4)
        shares = np.eye(2)[domains]
        assert window_accuracy(shares, domains) == (1.0, {0: 1.0, 1: 1.0})
        shares[7] = [1, 0]
        assert window_accuracy(shares, domains)[0] == 0.75

    def test_observe_sees_every_choice(self, model):
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(4, 6144, (3, 17), generator=generator)
        windows = Windows(tokens, np.array([0, 0, 1]))
        sample = observe(model, windows, "test")
        assert sample.expert_ids.shape == (6, 3, 16, 2)
        with torch.inference_mode():
            output = model(input_ids=tokens[:, :-1], output_router_logits=True)
        wanted = output.router_logits[3].topk(2, -1).indices.view(3, 16, 2)
        assert (sample.expert_ids[3] == wanted.numpy()).all()
        assert sample.losses == pytest.approx(window_losses(model, tokens))
        shares = histograms(sample.expert_ids, 16)
        assert shares.shape == (3, 96) and shares.sum(1) == pytest.approx(6)

    def test_a_masked_expert_is_never_chosen(self, model):
        tokens = torch.randint(4, 6144, (2, 33), generator=torch.Generator().manual_seed(2))
        windows = Windows(tokens, np.array([0, 1]))
        before = observe(model, windows, "before").expert_ids
        with masked_expert(routers(model)[2], 5):
            masked = observe(model, windows, "masked").expert_ids
        assert (before[2] == 5).any() and not (masked[2] == 5).any()
        assert (before[:2] == masked[:2]).all()
        unused = ~(before[2] == 5).any(-1)
        assert (before[2][unused] == masked[2][unused]).all()
        assert (observe(model, windows, "after").expert_ids == before).all()

    def test_harm_is_paired(self, model):
        tokens = torch.randint(4, 6144, (4, 33), generator=torch.Generator().manual_seed(3))
        windows = Windows(tokens, np.array([0, 0, 1, 1]))
        (harm,) = measure_harm(model, windows, [(1, 3)], "test")
        with masked_expert(routers(model)[1], 3):
            change = window_losses(model, tokens) - window_losses(model, tokens)
        assert (change == 0).all()
        assert harm.mean.shape == harm.error.shape == (2,)
        assert harm.worst_elsewhere == harm.mean.min()


class TestTrainer:
    @pytest.fixture
    def recipe(self, tmp_path):
        generator = np.random.default_rng(0)
        for split in ("train", "validation"):
            (tmp_path / "encoded" / split).mkdir(parents=True)
            for name in DOMAIN_NAMES:
                stream = generator.integers(4, 300, 1400).astype(np.uint16)
                np.save(tmp_path / "encoded" / split / f"{name}.npy", stream)
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tokenizer / name).write_text("{}")
        return Recipe(tmp_path, tokenizer, None, 1.0, 4, 1e-3, 1, 0, None, "cpu")

    def test_resumed_equals_uninterrupted(self, recipe, monkeypatch):
        monkeypatch.setattr("capture.demo.train.CHECKPOINT_SECONDS", 0.0)
        monkeypatch.setattr(Trainer, "check", lambda _: 0.0)
        monkeypatch.setattr("capture.demo.train.save_snapshot", lambda *_: None)
        through = Trainer(recipe, resume=False)
        through.run()
        stopped = Trainer(recipe, resume=False)
        draw = stopped.sampler.draw

        def draw_twice():
            if stopped.progress.step == 2:
                raise KeyboardInterrupt
            return draw()

        monkeypatch.setattr(stopped.sampler, "draw", draw_twice)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        resumed = Trainer(recipe, resume=True)
        assert resumed.progress.step == 2
        resumed.run()
        assert resumed.progress.step == through.progress.step == 4
        for one, two in zip(through.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, two)

    def test_stages_add_up_over_warm_starts(self, recipe, monkeypatch):
        monkeypatch.setattr(Trainer, "check", lambda _: 0.0)
        first = replace(recipe, steps=1)
        Trainer(first, resume=False).run()
        weights = list_snapshots(recipe.work)[-1]
        again = replace(recipe, steps=2, init=weights, cluster_router=1)
        monkeypatch.setattr("capture.demo.train.cluster_router", lambda *_: None)
        Trainer(again, resume=False).run()
        one, two = read_stages(list_snapshots(recipe.work)[-1])
        assert [one] == read_stages(weights)
        assert (one["steps"], one["warm_start"], one["cluster_router"]) == (1, False, None)
        assert (two["steps"], two["warm_start"], two["cluster_router"]) == (2, True, 1)


def test_a_missing_corpus_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(SystemExit, match=r"no .*bible_kjv.npy. Make it with: python -m .*--work"):
        evaluate.main(["--work", str(tmp_path), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
