"""Every difference that README and docs/ claim, and where its figures are: the table of ``significance.py``."""

from functools import partial
from typing import Any

from claim import EACH, Claim, Place, Those, counted, crossed, examples, medians, run, seeds

POINTS: dict[str, Any] = {"unit": "points", "scale": 100}
NATS: dict[str, Any] = {"unit": "nats"}
TIMES: dict[str, Any] = {"unit": "times"}


def of_study(name: str, variant: str, figure: str, point: str | None = None) -> Place:
    chosen = {"variant": variant} | ({} if point is None else {"point": point})
    return (f"{name}.json", "points", chosen, "by_seed", figure)


def of_table(name: str, method: str, key: str = "by_seed") -> Place:
    """Of `sqs reproduce`."""
    return (f"{name}.json", "rows", {"method": method}, key)


def of_seeds(name: str, predictor: str, *keys: str) -> Place:
    """Of `averaging.py` and `uncertainty.py`."""
    return (f"{name}.json", "seeds", EACH, "predictors", predictor, *keys)


def of_drawn(kind: str, *keys: str) -> Place:
    return ("drawn_file.json", "seeds", EACH, kind, *keys)


def of_rows(name: str, **chosen: Any) -> Place:
    return (f"{name}.json", "rows", chosen)


def of_product(method: str, rows: int, name: str = "kernels") -> Place:
    return (f"{name}.json", "rows", {"outputs": 4096, "inputs": 4096, "rows": rows, "method": method})


def of_network(name: str, method: str, batch: int) -> Place:
    return (f"{name}.json", "rows", {"batch": batch, "cold": True, "method": method})


def of_gates(kind: str, score: str, how: str, figure: str) -> Place:
    return ("gates.json", kind, "by seed", EACH, "correlations", score, how, figure)


def of_splits(problem: str, method: str, figure: str) -> Place:
    return ("nuts.json", "rows", Those(problem=problem, method=method), figure)


def of_neighbours(method: str, text: str) -> Place:
    return ("sentence_embedding.json", "rows", {"method": method}, text, "neighbour")


DEEP = "Deep Compression, K = 8"
RATES, LAWS, TAUGHT = (
    "fashion_mnist_rate_distortion",
    "fashion_mnist_laws_of_zeros",
    "fashion_mnist_laws_distilled",
)
ADAPTIVE = "fashion_mnist_adaptive"
RATE, KERNELS = "a rate a layer", "channels and kernels"
OWN_NORM, DIGITS = "averaging_fashion_mnist_own_batch_norm", "averaging_digits"
PACKED, SCALED, DRAWN = "packed", "packed, scaled", "packed, average of 10"
UNCERTAIN, ENSEMBLE = "uncertainty_digits", "deep ensemble of 5"
GUIDE, MIXTURE = "SpikeGMMGuide", "GuideMixture"
NOISE = ("entropy_auroc", "noise:1")
INT8 = "int8_activations.json"

_KEEPS = {
    "rate_distortion.md": "by 0.25 ± 0.33, 0.19 ± 0.29 and 0.20 ± 0.22 point over Deep Compression: three seeds"
}
_LAW = {"rate_distortion.md": "channels and kernels keeps a tenth more non-zeros, and is 0.15 ± 0.08 point"}
_SMALL, _LARGE = ("ResNet-20", "paper_cifar10_here"), ("ResNet-32", "paper_cifar10_here_resnet32")
_FEW_STEPS = (
    ({"paper.md": "K-means without zeros, LSQ and DGMS are 1.3 to 1.6 points"}, *_SMALL),
    ({"paper.md": "methods without enforced zeros are 1.0 to 1.6 points"}, *_LARGE),
)
_FEW_STEPS_32 = (
    ({"paper.md": "SQS is 2.4 points ahead of Deep Compression"}, *_SMALL),
    ({"paper.md": "SQS is 3.0 points ahead of Deep Compression"}, *_LARGE),
)
_LAW_DEEP = {
    "rate_distortion.md": "That is 0.32 ± 0.32 point over Deep Compression where 0.4 were hoped for",
    "goals.md": "[0.32 ± 0.32 point over Deep Compression at ratio 32]",
}
_TEACHER = {"rate_distortion.md": "opinion gains 0.37 ± 0.25, 0.36 ± 0.15 and 0.23 ± 0.22 point, with each method"}
_LEFT = {
    "rate_distortion.md": "beyond chance after Holm's correction are the accuracy of channels and kernels (p 0.03)"
}
_SPIKE = {
    "priors.md": "(without it 0.013 nats are lost, without any prior 0.016), and the learned prior helps again"
}
_CALIBRATES = {
    "compare.md": "better than no prior and than a Normal without a spike, the learned prior better than these"
}
_SLABS = {"priors.md": "the hierarchical inclusion and a Gaussian spike cannot be told from spike + Normal"}
_NO_ACCURACY = {
    "priors.md": "no difference of accuracy is beyond chance",
    "compare.md": "accuracies of 500 test images cannot be told apart",
    "paper.md": "on digits in [calibration, not in accuracy]",
}
_AVERAGE = {"averaging.md": "than the greedy network by 0.0035 ± 0.0033 nats and 0.38 ± 0.11 points"}
_AVERAGE_SCALED = {"averaging.md": "0.0029 ± 0.0029 nats, 0.23 ± 0.35 points. Accuracies cannot be told apart"}
_DRAWN = {
    "averaging.md": "The average is better calibrated than its network and knows noise and turned images better"
}
_DRAWN_NOT = {
    "averaging.md": "it does not predict better, and one temperature does as much for ECE and more for NLL"
}
_NOTHING = {"averaging.md": "Averaging does nothing here that 500 test images could show"}
_FIVE = {"uncertainty.md": "Five networks have the best means of everything but calibration error and bytes"}
_NOISE_KNOWN = {
    "uncertainty.md": "By mutual information noise of 1 tells itself apart better than by entropy, for every peer"
}
_GATES = {"inference.md": "better than magnitudes of the trained network do"}
_WITHIN = {"inference.md": "within layers the two do the same (0.35 and 0.36 beside 0.41 and 0.39)"}
_NUTS = {"inference.md": "(NLL -0.010 ± 0.014 of diabetes, -0.17 ± 0.36 of Friedman's function)"}
_STARTS = {
    "inference.md": "(coverage +0.125 ± 0.105, and +0.09 ± 0.05 beside AutoNormal, whose NLL is 0.38 ± 0.17 higher"
}
_NEAR = {"blockwise.md": "NF4 (+6.5 ± 4.5), beside HQQ (+4.0 ± 4.3) and on foreign text (+1.7 ± 4.0, +2.4 ± 4.0)"}
_BLOCKS = {
    "README.md": "Its blocks alone, own kind of text and foreign, one run of each",
    "measured.md": "from the packed file, one run of each",
    "blockwise.md": "one run of each, ours from packed files",
}
_LLAMA = {
    "README.md": "[4 times for Llama blocks and 1.2 to 1.4 times for ResNet-20]",
    "measured.md": "packed in float32 and 1.4 times in bfloat16, twelve Llama blocks 4.2 and 4.6 times",
}
_DECODES = {"measured.md": "decodes 41 tokens a second in bfloat16, where the dense network makes 22 and NF4 31"}
_PARITY = {"kernels.md": "there is no more to win than parity with bfloat16"}
_INT8 = {"kernels.md": "perplexity held-out / foreign, in one run"}

CLAIMS = [
    # Convolutional networks
    Claim(
        {
            "README.md": "| 94.31 | 0.17 ± 0.15 (",
            "measured.md": "| 94.31 | 0.17 ± 0.15 (",
            "goals.md": "0.17 ± 0.15 point",
        },
        "ResNet-20 at ratio 17: points below fp32",
        seeds,
        ("fashion_mnist_resnet20.json", "by_seed", "accuracy_drop"),
        0,
        1,
        **POINTS,
    ),
    Claim(
        {
            "README.md": "| 93.88 | 0.60 ± 0.54 (",
            "measured.md": "| 93.88 | 0.60 ± 0.54 (",
            "goals.md": "0.60 ± 0.54 point",
        },
        "ResNet-20 at ratio 32: points below fp32",
        seeds,
        ("fashion_mnist_resnet20_32x.json", "by_seed", "accuracy_drop"),
        0,
        1,
        **POINTS,
    ),
    Claim(
        {
            "README.md": "| 94.20 | 0.42 ± 0.32 (",
            "measured.md": "| 94.20 | 0.42 ± 0.32 (",
            "goals.md": "0.42 ± 0.32 point",
        },
        "ResNet-20 at ratio 32, distilled: points below fp32",
        seeds,
        of_study("fashion_mnist_distilled", "learned prior, distilled", "accuracy_drop"),
        0,
        1,
        **POINTS,
    ),
    *(
        Claim(
            _KEEPS,
            f"learned prior less Deep Compression at ratio {ratio}, accuracy",
            seeds,
            of_study(RATES, "learned prior", "accuracy", f"target_ratio={ratio}"),
            of_study(RATES, DEEP, "accuracy", f"target_ratio={ratio}"),
            0,
            **POINTS,
        )
        for ratio in (24, 32, 45)
    ),
    *(
        Claim(_LAW, f"law of channels and kernels less a ρ a layer, {name}", seeds, ours, theirs, 1, **POINTS)
        for name, ours, theirs in (
            ("non-zeros", of_study(LAWS, KERNELS, "nonzero_rate"), of_study(LAWS, RATE, "nonzero_rate")),
            ("accuracy", of_study(LAWS, KERNELS, "accuracy"), of_study(LAWS, RATE, "accuracy")),
        )
    ),
    Claim(
        _LAW,
        "the same, other images too, accuracy",
        crossed,
        (
            "paired_losses_laws.json",
            "rows",
            {"variant": KERNELS, "reference": RATE},
            "accuracy",
            "seeds and images",
        ),
        0,
        1,
        **POINTS,
    ),
    *(
        Claim(
            sentence,
            f"{network}, 126 steps, ratio 16 of the file: {method} less SQS, accuracy",
            seeds,
            of_table(table, method),
            of_table(table, "SQS"),
            1,
            **POINTS,
        )
        for sentence, network, table in _FEW_STEPS
        for method in ("DGMS", "LSQ", "K-means")
    ),
    *(
        Claim(
            sentence,
            f"{network}, 126 steps, ratio 32 of the file: SQS less Deep Compression, accuracy",
            seeds,
            of_table(table, "SQS, 32x of the file"),
            of_table(table, "Deep Compression, 32x of the file"),
            1,
            **POINTS,
        )
        for sentence, network, table in _FEW_STEPS_32
    ),
    Claim(
        {"paper.md": "points before pruning and K-means without training may be chance"},
        "MiniLM, 82 steps: SQS less pruning and K-means without training, accuracy",
        partial(examples, n=370),
        of_table("paper_squad_here", "SQS", "ours"),
        of_table("paper_squad_here", "pruning + K-means, no training", "ours"),
        0,
        **POINTS,
    ),
    Claim(
        {"paper.md": "57.6 % are left, 18.6 ± 8.1 points less"},
        "SmolLM2, 82 steps: SQS with half of the weights less fp32, accuracy",
        partial(examples, n=370),
        of_table("paper_sst2_here", "SQS", "ours"),
        of_table("paper_sst2_here", "SQS", "fp32"),
        -1,
        **POINTS,
    ),
    Claim(
        {"paper.md": "points behind SQS with half of them"},
        "MiniLM, 82 steps: SQS with a quarter of the weights less with half, accuracy",
        partial(examples, n=370),
        of_table("paper_squad_here", "SQS, 25 % non-zero", "ours"),
        of_table("paper_squad_here", "SQS", "ours"),
        -1,
        **POINTS,
    ),
    Claim(
        _LAW_DEEP,
        "law of channels and kernels less Deep Compression, accuracy",
        seeds,
        of_study(LAWS, KERNELS, "accuracy"),
        of_study(LAWS, DEEP, "accuracy"),
        0,
        **POINTS,
    ),
    Claim(
        _LAW_DEEP,
        "the same, NLL",
        seeds,
        of_study(LAWS, KERNELS, "nll"),
        of_study(LAWS, DEEP, "nll"),
        -1,
        **NATS,
    ),
    *(
        Claim(
            _TEACHER,
            f"with a teacher less without, {name}, accuracy",
            seeds,
            of_study(TAUGHT, variant, "accuracy"),
            of_study(LAWS, variant, "accuracy"),
            1,
            **POINTS,
        )
        for name, variant in (
            ("Deep Compression", DEEP),
            ("a ρ a layer", RATE),
            ("channels and kernels", KERNELS),
        )
    ),
    Claim(
        {"goals.md": "[94.26 % at ratio 32, 0.36 ± 0.14 point below fp32]"},
        "channels and kernels with a teacher: points below fp32",
        seeds,
        of_study(TAUGHT, KERNELS, "accuracy_drop"),
        0,
        1,
        **POINTS,
    ),
    Claim(
        _LEFT,
        "with a teacher, channels and kernels less Deep Compression, accuracy",
        seeds,
        of_study(TAUGHT, KERNELS, "accuracy"),
        of_study(TAUGHT, DEEP, "accuracy"),
        1,
        **POINTS,
    ),
    Claim(
        {"rate_distortion.md": "and the NLL of a ρ a layer (p 0.04)"},
        "with a teacher, a ρ a layer less Deep Compression, NLL",
        seeds,
        of_study(TAUGHT, RATE, "nll"),
        of_study(TAUGHT, DEEP, "nll"),
        -1,
        **NATS,
    ),
    Claim(
        {"rate_distortion.md": "Between these two there is then no difference"},
        "with a teacher, channels and kernels less a ρ a layer, accuracy",
        seeds,
        of_study(TAUGHT, KERNELS, "accuracy"),
        of_study(TAUGHT, RATE, "accuracy"),
        0,
        **POINTS,
    ),
    Claim(
        {
            "rate_distortion.md": "94.08 (94.25, 94.22, 94.11, 93.91, 93.89) | 0.54 ± 0.21",
            "goals.md": "[ratio 45 at 0.54 ± 0.21 point]",
            "README.md": "| 94.08 | 0.54 ± 0.21 (0.37, 0.40, 0.51, 0.71, 0.73) |",
        },
        "adaptive at ratio 45 with a teacher: points below fp32",
        seeds,
        of_study(ADAPTIVE, "ratio 45", "accuracy_drop"),
        0,
        1,
        **POINTS,
    ),
    *(
        Claim(
            {"rate_distortion.md": sentence},
            f"with a teacher, adaptive at ratio 45 less {name} at 32, accuracy",
            seeds,
            of_study(ADAPTIVE, "ratio 45", "accuracy"),
            of_study(TAUGHT, variant, "accuracy"),
            claimed,
            **POINTS,
        )
        for name, variant, claimed, sentence in (
            ("Deep Compression", DEEP, 0, "of Deep Compression at ratio 32 (0.00 ± 0.19 point)"),
            ("a ρ a layer", RATE, 0, "It is 0.16 ± 0.32 point below a ρ a layer at 32"),
            ("channels and kernels", KERNELS, -1, "and 0.18 ± 0.14 below its own law there"),
        )
    ),
    Claim(
        {"rate_distortion.md": "at the same three seeds ours has 0.45 ± 0.33 point more"},
        "adaptive at ratio 45 less NNC, fine-tuned alike, at as many bytes, accuracy",
        seeds,
        ("nnc_bar.json", "compared", {"nnc": "fine_tuned", "variant": "ratio 45"}, "gain_by_seed"),
        0,
        1,
        **POINTS,
    ),
    Claim(
        {"format.md": "93.74 % accuracy in place of 93.73, one image of 10,000"},
        "adaptive streams of a ResNet-20 at ratio 32, bytes over those of `entropy`",
        counted,
        ("standard_coder.json", "rows", {"weights": "ResNet-20, ratio 32"}, "adaptive", "bytes"),
        ("standard_coder.json", "rows", {"weights": "ResNet-20, ratio 32"}, "entropy", "bytes"),
        -1,
        **TIMES,
    ),
    Claim(
        {"cli.md": "measured once, in float32"},
        "half a point: lost on validation data, over what was allowed",
        run,
        ("fashion_mnist_half_a_point.json", "search", "attempts", 0, "points"),
        0.5,
        1,
        **TIMES,
    ),
    # Priors
    *(
        Claim(
            _SPIKE,
            f"{name}, NLL, other images too",
            crossed,
            (
                "paired_losses.json",
                "rows",
                {"variant": variant, "reference": reference},
                "nll",
                "seeds and images",
            ),
            0,
            sign,
            **NATS,
        )
        for name, variant, reference, sign in (
            ("no prior less spike + Normal", "no prior", "spike + Normal", 1),
            ("plain Normal less spike + Normal", "plain Normal", "spike + Normal", 1),
            ("learned prior less spike + Normal", "learned", "spike + Normal", -1),
            ("learned prior less no prior", "learned", "no prior", -1),
        )
    ),
    *(
        Claim(
            _SLABS if prior != "learned, rate-distortion" else {"priors.md": "Rate-distortion gains nothing here"},
            f"{prior} less spike + Normal, NLL, other images too",
            crossed,
            (
                "paired_losses.json",
                "rows",
                {"variant": prior, "reference": "spike + Normal"},
                "nll",
                "seeds and images",
            ),
            0,
            0,
            **NATS,
        )
        for prior in ("spike + Laplace", "hierarchical", "Gaussian spike", "learned, rate-distortion")
    ),
    Claim(
        {"priors.md": "and 0.0070 (Student-t); all four stay beyond chance with Holm's correction"},
        "spike + Student-t less spike + Normal, NLL, other images too",
        crossed,
        (
            "paired_losses.json",
            "rows",
            {"variant": "spike + Student-t", "reference": "spike + Normal"},
            "nll",
            "seeds and images",
        ),
        0,
        1,
        **NATS,
    ),
    *(
        Claim(
            _CALIBRATES,
            f"{name}, ECE",
            seeds,
            of_study("compare_priors", ours, "ece"),
            of_study("compare_priors", theirs, "ece"),
            -1,
            **POINTS,
        )
        for name, ours, theirs in (
            ("spike + Normal less no prior", "spike + Normal", "no prior"),
            ("spike + Normal less plain Normal", "spike + Normal", "plain Normal"),
            ("learned prior less spike + Normal", "learned", "spike + Normal"),
            ("learned prior less plain Normal", "learned", "plain Normal"),
        )
    ),
    Claim(
        _NO_ACCURACY,
        "no prior less spike + Normal, accuracy",
        seeds,
        of_study("compare_priors", "no prior", "accuracy"),
        of_study("compare_priors", "spike + Normal", "accuracy"),
        0,
        **POINTS,
    ),
    # Averaging
    *(
        Claim(
            says,
            f"average less {name}",
            seeds,
            of_seeds(OWN_NORM, "average", key),
            of_seeds(OWN_NORM, than, key),
            sign,
            **unit,
        )
        for says, name, than, key, sign, unit in (
            (_AVERAGE, "greedy, NLL", "greedy", "nll", -1, NATS),
            (_AVERAGE, "greedy, ECE", "greedy", "ece", -1, POINTS),
            (_AVERAGE_SCALED, "greedy, accuracy", "greedy", "accuracy", 0, POINTS),
            (_AVERAGE_SCALED, "greedy scaled, NLL", "greedy, scaled", "nll", 0, NATS),
            (_AVERAGE_SCALED, "greedy scaled, ECE", "greedy, scaled", "ece", 0, POINTS),
        )
    ),
    *(
        Claim(
            _NOTHING,
            f"average less greedy on digits, {name}",
            seeds,
            of_seeds(DIGITS, "average", *keys),
            of_seeds(DIGITS, "greedy", *keys),
            0,
            **unit,
        )
        for name, keys, unit in (
            ("accuracy", ("accuracy",), POINTS),
            ("NLL", ("nll",), NATS),
            ("ECE", ("ece",), POINTS),
            ("AUROC of uniform noise", ("shifted", "auroc uniform"), {}),
        )
    ),
    *(
        Claim(
            says,
            f"average of drawn file less {name}",
            seeds,
            of_drawn(DRAWN, *keys),
            of_drawn(than, *keys),
            sign,
            **unit,
        )
        for says, name, than, keys, sign, unit in (
            (_DRAWN, "packed, ECE", PACKED, ("ece",), -1, POINTS),
            (_DRAWN, "packed, AUROC turned", PACKED, ("entropy_auroc", "rotation:45"), 1, {}),
            (_DRAWN, "packed, AUROC noise", PACKED, ("entropy_auroc", "noise:0.5"), 1, {}),
            (_DRAWN_NOT, "packed, accuracy", PACKED, ("accuracy",), 0, POINTS),
            (_DRAWN_NOT, "packed, NLL", PACKED, ("nll",), 0, NATS),
            (_DRAWN_NOT, "packed scaled, ECE", SCALED, ("ece",), 0, POINTS),
            (_DRAWN_NOT, "packed scaled, NLL", SCALED, ("nll",), 1, NATS),
        )
    ),
    Claim(
        {"averaging.md": "0.35 point of accuracy may be ± 0.70 by the images alone"},
        "one file of ratio 32 less two of ratio 64, accuracy",
        partial(examples, n=10_000),
        ("drawn_file_float32.json", "seeds", "0", "packed", "accuracy"),
        ("drawn_file_float32.json", "seeds", "0", "two files of ratio 64", "accuracy"),
        0,
        **POINTS,
    ),
    Claim(
        {"averaging.md": "(more by 0.040 ± 0.017 in the four fits)"},
        "mixture of guides less one guide, sd beyond the data",
        partial(seeds, of="fits"),
        ("mixture.json", "rows", EACH, "mixture", "beyond"),
        ("mixture.json", "rows", EACH, "one guide", "beyond"),
        1,
    ),
    # Uncertainty
    *(
        Claim(
            says, name, seeds, of_seeds(UNCERTAIN, ours, *keys), of_seeds(UNCERTAIN, theirs, *keys), sign, **unit
        )
        for says, name, ours, theirs, keys, sign, unit in (
            (_FIVE, "ensemble less MAP, AUROC noise", ENSEMBLE, "MAP", NOISE, 1, {}),
            (_FIVE, "ensemble less SWAG, accuracy", ENSEMBLE, "SWAG", ("accuracy",), 1, POINTS),
            (_FIVE, "ensemble less MAP, NLL", ENSEMBLE, "MAP", ("nll",), 0, NATS),
            (
                {"uncertainty.md": "shown of noise alone (+0.011 ± 0.003)"},
                "SWAG less MAP, AUROC noise",
                "SWAG",
                "MAP",
                NOISE,
                1,
                {},
            ),
            (
                {"uncertainty.md": "Dropout costs NLL (0.008 ± 0.006)"},
                "dropout less MAP, NLL",
                "MC dropout",
                "MAP",
                ("nll",),
                1,
                NATS,
            ),
            (
                {"uncertainty.md": "notices noise better (+0.047 ± 0.011)"},
                "dropout less MAP, AUROC noise",
                "MC dropout",
                "MAP",
                NOISE,
                1,
                {},
            ),
            (
                {"uncertainty.md": "of AutoNormal neither is shown"},
                "AutoNormal less MAP, NLL",
                "AutoNormal",
                "MAP",
                ("nll",),
                0,
                NATS,
            ),
            (
                {"uncertainty.md": "error is 4.1 ± 2.3 points above the network's"},
                "Laplace less MAP, ECE",
                "Laplace, last layer",
                "MAP",
                ("ece",),
                1,
                POINTS,
            ),
            (
                {"uncertainty.md": "it notices noise better (+0.096 ± 0.028)"},
                "Laplace less MAP, AUROC noise",
                "Laplace, last layer",
                "MAP",
                NOISE,
                1,
                {},
            ),
            (
                {"uncertainty.md": "Compression to a twentieth costs NLL (0.034 ± 0.008)"},
                "packed less MAP, NLL",
                "packed",
                "MAP",
                ("nll",),
                1,
                NATS,
            ),
            (
                {"uncertainty.md": "a third of that back in the mean (0.011 ± 0.036)"},
                "packed scaled less packed, NLL",
                "packed, scaled",
                "packed",
                ("nll",),
                0,
                NATS,
            ),
            (
                {"uncertainty.md": "no better than the packed network itself (NLL +0.008 ± 0.022)"},
                "average less packed, NLL",
                "packed, average",
                "packed",
                ("nll",),
                0,
                NATS,
            ),
        )
    ),
    *(
        Claim(
            _NOISE_KNOWN,
            f"mutual information less entropy of {name}, AUROC noise",
            seeds,
            of_seeds(UNCERTAIN, peer, "information_auroc", "noise:1"),
            of_seeds(UNCERTAIN, peer, *NOISE),
            1,
        )
        for name, peer in (
            ("dropout", "MC dropout"),
            ("ensemble", ENSEMBLE),
            ("SWAG", "SWAG"),
            ("Laplace", "Laplace, last layer"),
            ("AutoNormal", "AutoNormal"),
        )
    ),
    # Inference
    Claim(
        _GATES,
        "λ less trained magnitude, AUROC of removal, means",
        seeds,
        of_gates("inferred", "λ", "means, train", "more than a nat"),
        of_gates("inferred", "|w|, trained", "means, train", "more than a nat"),
        1,
    ),
    Claim(
        {"inference.md": "λ tells them less well than the posterior's abs(w)/s does"},
        "λ less abs(w)/s, AUROC of removal, draws",
        seeds,
        of_gates("inferred", "λ", "draws, train", "more than a nat"),
        of_gates("inferred", "|w|/s", "draws, train", "more than a nat"),
        -1,
    ),
    *(
        Claim(
            says,
            f"λ less codeword magnitude, {name}, correlation {within}",
            seeds,
            of_gates(kind, "λ", "hard, train", within),
            of_gates(kind, "|w|", "hard, train", within),
            sign,
        )
        for says, within, sign in (
            ({"inference.md": "0.17 ± 0.13 and 0.15 ± 0.04 of the codewords' magnitudes"}, "all", 1),
            (_WITHIN, "within layers", 0),
        )
        for name, kind in (("spike + Normal", "compressed, normal"), ("learned prior", "compressed, learned"))
    ),
    Claim(
        {"inference.md": "inclusion probabilities have the error of coordinate ascent in the same family"},
        "guide less coordinate ascent, correlated features, largest error",
        partial(seeds, of="data sets"),
        ("exact_posterior.json", "rows", Those(features="correlated"), "guide", "largest_error"),
        ("exact_posterior.json", "rows", Those(features="correlated"), "coordinate ascent", "largest_error"),
        0,
    ),
    *(
        Claim(
            says,
            name,
            partial(seeds, of="splits"),
            of_splits(problem, ours, figure),
            of_splits(problem, theirs, figure),
            sign,
            **unit,
        )
        for says, name, problem, ours, theirs, figure, sign, unit in (
            (_NUTS, "guide less AutoNormal on diabetes, NLL", "diabetes", GUIDE, "AutoNormal", "nll", 0, NATS),
            (_NUTS, "guide less AutoNormal on Friedman's, NLL", "friedman", GUIDE, "AutoNormal", "nll", 0, NATS),
            (_STARTS, "mixture less guide on Friedman's, coverage", "friedman", MIXTURE, GUIDE, "coverage", 1, {}),
            (
                _STARTS,
                "mixture less AutoNormal on Friedman's, coverage",
                "friedman",
                MIXTURE,
                "AutoNormal",
                "coverage",
                1,
                {},
            ),
            (
                _STARTS,
                "mixture less AutoNormal on Friedman's, NLL",
                "friedman",
                MIXTURE,
                "AutoNormal",
                "nll",
                -1,
                NATS,
            ),
        )
    ),
    Claim(
        {"inference.md": "1,000 examples of the classes it has 8.9 ± 4.0 points more right, in one run"},
        "guide less AutoNormal on classes, accuracy",
        partial(examples, n=1000),
        ("nuts.json", "rows", {"problem": "sparse_classes", "method": GUIDE}, "accuracy"),
        ("nuts.json", "rows", {"problem": "sparse_classes", "method": "AutoNormal"}, "accuracy"),
        1,
        **POINTS,
    ),
    # Windows
    *(
        Claim(
            {"windows.md": "It loses four times the energy on a Gaussian layer and seven times on Student-t"},
            f"eleven equal windows over per weight, squared error, {name}",
            counted,
            (*layer, {"windows": "equal mass, 11"} | chosen, "error"),
            (*layer, {"windows": "per weight"} | chosen, "error"),
            1,
            **TIMES,
        )
        for chosen in ({"components": 16, "zero_rate": 0.0, "codebook_of": "survivors"},)
        for name, layer in (
            ("Gaussian", ("windows.json", "gaussian", "rows")),
            ("Student-t", ("windows.json", "student_t3", "rows")),
        )
    ),
    # Language models and embeddings
    *(
        Claim(
            _BLOCKS,
            f"{name}, perplexity {text}",
            run,
            (*of_rows("language_model", method=ours), text),
            (*of_rows("language_model", method=theirs), text),
            -1,
            **TIMES,
        )
        for name, ours, theirs in (
            ("blockwise 3.2 bits over GPTQ 3.3", "blockwise, bits=3.2", "GPTQ, 3 bits, groups of 64"),
            ("blockwise 3.2 bits over NF4 4.5", "blockwise, bits=3.2", "NF4, bitsandbytes, blocks of 64"),
            ("blockwise 2.6 bits over GPTQ 2.56", "blockwise, bits=2.6", "GPTQ, 2 bits, groups of 32"),
        )
        for text in ("held-out", "foreign")
    ),
    *(
        Claim(
            {"blockwise.md": "One setting of each was run"}
            | {"README.md": "| blockwise, then 200 steps of SVI | 2.60 |"},
            f"200 steps of SVI over without, perplexity {text}",
            run,
            (*of_rows("language_model_finetuned", method="blockwise, then SVI"), text),
            (*of_rows("language_model_finetuned", method="blockwise"), text),
            -1,
            **TIMES,
        )
        for text in ("held-out", "foreign")
    ),
    *(
        Claim(
            {"blockwise.md": "on texts of other kinds as well. One run of each"},
            f"150 last steps over without, perplexity {text}",
            run,
            ("language_model_whole_file_finished.json", "rows", 1, text),
            ("language_model_whole_file.json", "rows", 1, text),
            -1,
            **TIMES,
        )
        for text in ("held-out", "foreign", "jargon")
    ),
    *(
        Claim(
            _NEAR,
            f"blockwise 4 bits less {name}, neighbours, {text}",
            partial(examples, n=n),
            of_neighbours("blockwise, bits=4", text),
            of_neighbours(method, text),
            sign,
            **POINTS,
        )
        for name, method, text, n, sign in (
            ("NF4", "NF4, bitsandbytes, blocks of 64", "held-out", 505, 1),
            ("HQQ", "HQQ, 4 bits, groups of 64", "held-out", 505, 0),
            ("NF4", "NF4, bitsandbytes, blocks of 64", "foreign", 1000, 0),
            ("HQQ", "HQQ, 4 bits, groups of 64", "foreign", 1000, 0),
        )
    ),
    Claim(
        {"blockwise.md": "as near as 29.5 MB whose embedding is left alone, on foreign text nearer"},
        "10.9 MB with its embedding over 29.5 MB, cosine foreign",
        run,
        (
            "sentence_embedding_whole_file.json",
            "rows",
            {"method": "blockwise, megabytes=11.0"},
            "foreign",
            "cosine",
        ),
        ("sentence_embedding.json", "rows", {"method": "blockwise, bits=4"}, "foreign", "cosine"),
        1,
        **TIMES,
    ),
    Claim(
        {"blockwise.md": "Under an entropy coder an even grid loses nothing"},
        "whole numbers over free codewords at 3.2 bits, squared error of seven layers",
        counted,
        ("uniform_grid.json", "rows", {"bits": 3.2, "grid": "uniform"}, "error"),
        ("uniform_grid.json", "rows", {"bits": 3.2, "grid": "free"}, "error"),
        0,
        **TIMES,
    ),
    *(
        Claim(
            _INT8,
            f"{name} over as it is, perplexity held-out",
            run,
            (INT8, name, "held-out"),
            (INT8, "as it is", "held-out"),
            1,
            **TIMES,
        )
        for name in ("inputs in 8 bits", "inputs and codewords in 8 bits")
    ),
    # Speed
    *(
        Claim(
            {"measured.md": "| 1 | 9.6 | 8.4 | 2.3 |"},
            f"4096 × 4096, 4 bits, one row, as fast as {method}",
            medians,
            of_product("packed, 4 bits, bfloat16", 1),
            of_product(method, 1),
            1,
            **TIMES,
        )
        for method in ("float32", "bfloat16", "NF4 (bitsandbytes)")
    ),
    Claim(
        _PARITY,
        "the same at 64 rows, as fast as bfloat16",
        medians,
        of_product("packed, 4 bits, bfloat16", 64),
        of_product("bfloat16", 64),
        1,
        **TIMES,
    ),
    *(
        Claim(
            _LLAMA,
            f"{name}, {method}, batch 1, as fast as float32",
            medians,
            of_network(file, method, 1),
            of_network(file, "float32", 1),
            1,
            **TIMES,
        )
        for name, file in (("ResNet-20", "model_resnet20"), ("Llama blocks", "model_transformer"))
        for method in ("packed, float32", "packed, bfloat16")
    ),
    Claim(
        {"kernels.md": "measured with an earlier convolution, at batch 32 a sixth to a tenth slower than dense"},
        "ResNet-20, packed, float32, batch 32, as fast as float32",
        medians,
        of_network("model_resnet20", "packed, float32", 32),
        of_network("model_resnet20", "float32", 32),
        -1,
        **TIMES,
    ),
    Claim(
        {"kernels.md": "Two threads at 4096 × 4096, 4 bits: 1.7 times one at M = 1"},
        "4096 × 4096, 4 bits, one row, two threads, as fast as one",
        medians,
        (
            "kernels_2_threads.json",
            "rows",
            {"outputs": 4096, "inputs": 4096, "rows": 1, "method": "packed, 4 bits, bfloat16"},
        ),
        of_product("packed, 4 bits, bfloat16", 1),
        1,
        **TIMES,
    ),
    *(
        Claim(
            {"kernels.md": "At every M the product is faster than in float32 and than dense bfloat16"},
            f"Intel, 4096 × 4096, 4 bits, {rows} row(s), bfloat16, as fast as {other}",
            medians,
            of_product("packed, 4 bits, bfloat16", rows, "kernels_intel"),
            of_product(other, rows, "kernels_intel"),
            1,
            **TIMES,
        )
        for rows in (1, 16, 64)
        for other in ("packed, 4 bits, float32", "bfloat16")
    ),
    Claim(
        {"kernels.md": "At batch 32 nothing is gained in bfloat16"},
        "MobileNetV3-small, packed, bfloat16, batch 32, as fast as dense",
        medians,
        of_network("model_mobilenet_v3_small", "packed, bfloat16", 32),
        of_network("model_mobilenet_v3_small", "bfloat16", 32),
        0,
        **TIMES,
    ),
    Claim(
        {"kernels.md": "beyond a few rows of x a codebook for each output costs half of the speed"},
        "a codebook for each output, 16 rows, bfloat16, as fast as one codebook",
        medians,
        ("packed_products.json", "matrices", {"rows": 16, "dtype": "bfloat16", "method": "one for each output"}),
        ("packed_products.json", "matrices", {"rows": 16, "dtype": "bfloat16", "method": "one codebook"}),
        -1,
        **TIMES,
    ),
    Claim(
        {"averaging.md": "relative to the loop, in one run"},
        "ten draws of a ResNet-20 by vmap over the loop, processor time",
        run,
        ("draws.json", "relative processor time", "resnet20, batch 50", "vmap 10"),
        ("draws.json", "relative processor time", "resnet20, batch 50", "loop"),
        1,
        **TIMES,
    ),
    *(
        Claim(
            _DECODES,
            f"SmolLM2 at 2.6 bits less {name}, ms a token",
            partial(seeds, of="repeats"),
            ("decode_speed.json", "rows", {"network": "packed, bfloat16"}, "seconds_per_token"),
            ("decode_speed.json", "rows", {"network": name}, "seconds_per_token"),
            -1,
            unit="ms",
            scale=1000,
        )
        for name in ("dense, bfloat16", "NF4, bfloat16")
    ),
    *(
        Claim(
            {"blockwise.md": says},
            f"`--compile --int8` over llama.cpp, {on}, tokens a second (means of two processes)",
            run,
            (*of_rows(figures, way="generate --compile --int8", threads=1), "tokens_per_second"),
            (*of_rows(figures, way="llama.cpp", threads=1), "tokens_per_second"),
            1,
            **TIMES,
        )
        for says, figures, on in (
            ("Decoding is at 1.34 times the speed of llama.cpp on one thread", "generation", "one thread"),
            (
                "Decoding is at 1.21 times the speed of llama.cpp on one thread",
                "generation_llama_cpp_intel",
                "one thread of an Intel Xeon",
            ),
        )
    ),
    *(
        Claim(
            {"export.md": says},
            what,
            medians,
            of_rows(figures, **chosen, variant=f"ours, whole numbers{more}"),
            of_rows(figures, **chosen, variant="float32"),
            claimed,
            **TIMES,
        )
        for figures, says, what, chosen, more, claimed in (
            (
                "exported",
                "`onnx-qdq` is a third as fast on ResNet-20",
                "ResNet-20 as `onnx-qdq` over float32, speed",
                {"network": "resnet20", "runtime": "ONNX Runtime"},
                ", onnx-qdq",
                -1,
            ),
            (
                "exported",
                "ResNet-20 takes half the time",
                "ResNet-20 with `int8_examples` over float32, speed",
                {"network": "resnet20", "runtime": "ONNX Runtime"},
                ", int8 activations",
                1,
            ),
            (
                "exported_llama",
                "A token through blocks of a Llama takes half the time in ONNX Runtime",
                "six blocks as `onnx` over float32, speed of a token",
                {"runtime": "ONNX Runtime", "input": "1 token", "cold": True},
                "",
                1,
            ),
            (
                "exported_llama",
                "a third in OpenVINO",
                "six blocks in OpenVINO over float32, speed of a token",
                {"runtime": "OpenVINO", "input": "1 token", "cold": True},
                "",
                1,
            ),
            (
                "exported_llama_cpp",
                "In llama.cpp a token takes a third of the time",
                "SmolLM2 as `gguf` over float32, speed of a token",
                {"runtime": "llama.cpp", "input": "1 token"},
                "",
                1,
            ),
        )
    ),
    *(
        Claim(
            {"blockwise_ranks.md": sentence},
            what,
            run,
            (file, "ranks", 0, key),
            (file, "ranks", 1, key),
            1,
            **TIMES,
        )
        for sentence, what, file, key in (
            (
                "Two ranks are 1.86 times as fast as one",
                "two blocks, one rank over two, seconds of the processor",
                "ranks.json",
                "critical",
            ),
            (
                "of the first eight 1.68 times",
                "eight blocks, one rank over two, seconds of the processor",
                "ranks_eight_blocks.json",
                "critical",
            ),
            (
                "and 74 s on two: 1.58 times as fast",
                "eight blocks, one rank over two, by the clock",
                "ranks_eight_blocks_wall.json",
                "seconds",
            ),
        )
    ),
    Claim(
        {"measured.md": "interleaved, mean of 40 steps of one run"},
        "a coded step over a plain one, time",
        run,
        ("step_cost.json", "variants", "coded", "ratio_of_means"),
        ("step_cost.json", "variants", "plain", "ratio_of_means"),
        1,
        **TIMES,
    ),
]
