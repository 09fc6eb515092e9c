"""What the claims page advises: sentences, in which <task: arm> stands for that arm's score.

Each tuple is one piece of advice.  A sentence whose arms were not all run is left out of the page.
"""

ADVICE: list[tuple[str, ...]] = [
    (
        "**Begin with LoRA on all linear layers, at a rank of about 16.** On entities it scores "
        "<ner: LoRA>, full fine-tuning <ner: full>, a new head over the frozen model "
        "<ner: head only>.",
        "In conversations LoRA ends at a loss of <chat: LoRA>, full fine-tuning at <chat: full>.",
    ),
    (
        "**Take 4-bit weights (QLoRA) where memory is short.** On entities the scores are "
        "<ner: QLoRA> over the 4-bit base and <ner: LoRA> over the dense one.",
        "In conversations QLoRA ends at a loss of <chat: QLoRA> and LoRA at <chat: LoRA>: for a "
        "model of 135 M parameters rounding is not free, and 30 steps do not make up for it. Keep "
        "the weights of a small model dense if memory allows.",
        "NF4 in blocks of 64 raises the loss of SmolLM2 on other text by <types: NF4> before any "
        "training, FP4 by <types: FP4>, 4-bit integers by <types: Int4>, so NF4 is the type to "
        "take. With double quantisation the rise is <types: NF4 + double quantisation>, with "
        "blocks of 256 in place of 64 it is <types: NF4, blocks of 256>.",
    ),
    (
        "**Tune the learning rate before you change the method.** On entities none of rsLoRA, "
        "LoRA+, DoRA and PiSSA is further from LoRA than the deviations over three seeds, and "
        "LoftQ is no further from QLoRA. For most of them the next higher rate, a factor of 3.16 "
        "away, ended in a model that finds no entity at all. LoRA scores <ner: LoRA>, LoRA+ "
        "<ner: LoRA+>, DoRA <ner: DoRA>, rsLoRA <ner: rsLoRA>, PiSSA <ner: PiSSA>, LoftQ "
        "<ner: LoftQ>.",
        "In conversations rsLoRA (<chat: rsLoRA>) and DoRA (<chat: DoRA>) end where LoRA does "
        "(<chat: LoRA>), LoRA+ (<chat: LoRA+>) and PiSSA (<chat: PiSSA>) a little above, and LoftQ "
        "(<chat: LoftQ>) below QLoRA (<chat: QLoRA>), though not by more than the deviations.",
    ),
    (
        "**A rank of 4 to 16 is enough for little data.** Ranks 1, 4, 16 and 64 score "
        "<ranks: LoRA, rank 1>, <ranks: LoRA, rank 4>, <ner: LoRA> and <ranks: LoRA, rank 64>; "
        "rank 64 with rsLoRA's scaling <ranks: rsLoRA, rank 64>.",
    ),
    (
        "**Wrap the MLP as well as attention.** With as many parameters, all layers score "
        "<ner: LoRA>, attention alone <layers: LoRA, attention, rank 36> and the MLP alone "
        "<layers: LoRA, MLP, rank 29>.",
    ),
    (
        "**Mind the batch size.** When the same sentences come in batches of 64 in place of 16, "
        "LoRA goes from <ner: LoRA> to <batches: LoRA, batch 64> and full fine-tuning from "
        "<ner: full> to <batches: full, batch 64>. Both have a quarter of the steps then, and "
        "LoRA's factor B starts at zero, so part of the loss is that it has not gone far yet.",
    ),
    (
        "**Take P-tuning v2 where only a small file for each task may be kept, and train it for "
        "long.** After three epochs it scores <ner: P-tuning v2, 32>, and <ner: P-tuning v2, 8> "
        "with 8 positions in place of 32, well below LoRA. With 2,000 sentences and twelve epochs "
        "it closes most of the gap (`python -m benchmarks ner`, [Evidence](evidence.md)). It "
        "wants a higher rate than LoRA (see the table) and a start at 0.5 (`init_std=0.5`): at "
        "0.02 it scores <ner: P-tuning v2, 32, start 0.02>. A prefix in the first layer alone "
        "does no more than the new head (<ner: prefix in the first layer only>).",
        "In conversations a prefix of 16 positions ends at a loss of <chat: prefix>, a prompt of "
        "16 embeddings, which trains 20 times fewer numbers, at <chat: prompt>, and LoRA at "
        "<chat: LoRA>.",
    ),
]
