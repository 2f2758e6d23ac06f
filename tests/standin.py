"""The stand-in reward model and the written corpora behind `prepare.py --demo`, shared by the demo and the tests.

    build_reward_model(folder)    a tiny Llama reward model of random weights, with a tokenizer of its own
    write_tldr_corpus(folder)     Reddit-like comparisons in the schema of openai/summarize_from_feedback

The corpora are composed of the hand-written material below. A response has a style, a side of each attribute in
STYLES, and a worker a taste, a mixture of PLANTED_RANK directions over these attributes. The directions pull against
each other, so one reward for all workers fails many of them and LoRe at K = PLANTED_RANK can serve each. A style is
words and nothing else: the random model tells styles apart because its last state is near a mean over the words.
The material, the tastes and the scales of the weights were chosen so that a demo of seconds shows the effect.
"""

import itertools
import json
import random
import string
from pathlib import Path

import numpy as np
import torch

STANDIN_NOTE = ("demo: the reward model is a tiny stand-in with random weights and the comparisons are synthetic, "
                "written for this demo; the accuracies say nothing about real models or people")

# ---------------------------------------------------------------------------------------------------------------------
# Material: what happened
# ---------------------------------------------------------------------------------------------------------------------

PEOPLE = [  # who, he, him, his
    ("my roommate", "he", "him", "his"), ("my sister", "she", "her", "her"), ("my best friend", "she", "her", "her"),
    ("my brother", "he", "him", "his"), ("my boyfriend", "he", "him", "his"), ("my girlfriend", "she", "her", "her"),
    ("my father", "he", "him", "his"), ("my cousin", "she", "her", "her"), ("my best man", "he", "him", "his"),
    ("my mother", "she", "her", "her"), ("my uncle", "he", "him", "his"), ("my aunt", "she", "her", "her")]

SITUATIONS = [  # subreddit, title, what happened, its gist; the last ten are for the validation prompts
    ("relationships", "{Who} borrows my car without asking", "{Who} takes my car whenever I am out and brings it "
     "back with an empty tank. When I brought it up {he} laughed and said that sharing is normal.", "{Who} keeps "
     "taking my car without asking and leaves the tank empty."),
    ("Cooking", "Who keeps eating my lunch?", "I cook on Sundays for the whole week. By Tuesday the boxes are gone, "
     "and {who} swears it was not {him}, with my curry still on {his} sleeve.", "{Who} eats the lunches I cook for "
     "the week and denies it."),
    ("personalfinance", "Lent money, never saw it again", "I lent {who} money for a new laptop and we shook hands on "
     "it. Since then {he} changes the subject whenever I ask, and posts photos of {his} holidays.", "{Who} has not "
     "paid back the money I lent for a laptop."),
    ("AskReddit", "Is it normal to read someone's diary?", "I came home early and found {who} on my bed with my "
     "diary open. {He} said {he} was only looking for a pen.", "I caught {who} reading my diary."),
    ("pets", "{Who} feeds my dog chocolate", "My dog has a weak stomach and the vet was very clear about treats. "
     "{Who} slips him chocolate under the table because of the sad eyes.", "{Who} feeds my dog chocolate against the "
     "vet's advice."),
    ("weddingplanning", "{Who} wants to wear white to my wedding", "The wedding is in June and the dress code is on "
     "every invitation. {Who} has bought a long white outfit and says that nobody will mind.", "{Who} plans to wear "
     "white to my wedding."),
    ("jobs", "My idea, someone else's promotion", "I worked out a plan for the night shift and showed it to {who}. "
     "{He} took it to the boss as {his} own and got praised in front of everyone.", "{Who} presented my plan for the "
     "night shift as {his} own."),
    ("travel", "Stranded at the airport", "We booked a trip to Lisbon together. {Who} overslept, missed the train, "
     "and let me stand at the gate with both suitcases.", "{Who} overslept and missed our trip to Lisbon."),
    ("college", "Group project with a ghost", "{Who} and I signed up for the same seminar. {He} has not written a "
     "line of our paper and still wants {his} name on the first page.", "{Who} does no work on our paper but wants "
     "the credit."),
    ("offmychest", "Nobody came to my birthday", "I booked a table, baked a cake and hung up lights. {Who} had "
     "promised to bring everyone along and forgot to tell them the date.", "{Who} forgot to invite anyone to my "
     "birthday."),
    ("running", "Training partner who never shows up", "{Who} talked me into a half marathon. Now I stand at the "
     "park gate at dawn while {he} sleeps through every alarm.", "{Who} never shows up for the training {he} asked "
     "for."),
    ("Parenting", "Sweets before bedtime", "{Who} looks after my son on Fridays. He comes home with a bag of candy "
     "and does not sleep, and {who} says that childhood is short.", "{Who} gives my son candy before bedtime."),
    ("gaming", "Deleted save file", "I was near the end of a very long game. {Who} wanted to try it, started a new "
     "one and wrote over my save.", "{Who} deleted the save file of my game."),
    ("books", "Lent a first edition, got back a coaster", "It was a gift from my grandfather and I lent it to {who} "
     "after much begging. It came back with coffee rings and a broken spine.", "{Who} ruined the old book I had lent "
     "out."),
    ("legaladvice", "A fence in my garden", "{Who} put up a fence while I was away. It stands a good step inside my "
     "garden, across the roses.", "{Who} built a fence inside my garden."),
    ("dating_advice", "Secret profile on a dating site", "{Who} set up a dating profile with my photos as a joke. "
     "Two people from work have written to it, and {he} answered them.", "{Who} made a dating profile of me as a "
     "joke."),
    ("Music", "Drums after midnight", "The walls here are thin as paper. {Who} has discovered the drums and says "
     "that the muse comes at night.", "{Who} plays the drums after midnight."),
    ("tifu", "Told the secret to the wrong person", "I told {who} that I am looking for another flat. {He} mentioned "
     "it at dinner in front of the very people I share with.", "{Who} gave away that I want to move out."),
    ("fitness", "Unwanted diet advice", "I was ill last winter and gained weight. {Who} now comments on every plate "
     "and signed me up for a gym.", "{Who} comments on my weight and on every meal."),
    ("Advice", "Always an hour late", "We agree on a time and I wait. {Who} arrives when the film is half over and "
     "calls me stiff for minding.", "{Who} is always an hour late and calls me stiff."),
    ("relationship_advice", "Moved in without asking", "{Who} came for a weekend after a burst pipe. The pipe was "
     "mended long ago, and {his} plants are on my windowsill.", "{Who} came for a weekend and will not move out."),
    ("photography", "My photos under another name", "I shot the whole festival. {Who} put my pictures online under "
     "{his} name and sells prints.", "{Who} sells my festival photos under {his} name."),
    ("cats", "The cat was given away", "I was in hospital and {who} had my key. When I came home the cat was gone, "
     "given to a farm because of allergies.", "{Who} gave away my cat while I was in hospital."),
    ("self", "Sold my guitar", "My old guitar stood in the shared cellar. {Who} was clearing up and sold it at a "
     "flea market with the broken chairs.", "{Who} sold my guitar at a flea market."),
    ("college", "Copied my exam", "We studied together and sat side by side. The answers are the same down to the "
     "typos, and {who} says nothing while I have to explain.", "{Who} copied my exam and I am the one suspected."),
    ("Parenting", "Photos of my baby online", "I asked everybody to keep the baby off the internet. {Who} has posted "
     "an album for all the world to see.", "{Who} posts photos of my baby though I asked {him} not to."),
    ("jobs", "Reference from hell", "I named {who} as a reference for a new job. {He} told them that I am fine on "
     "days when I am awake.", "{Who} joked about me when a new employer called."),
    ("travel", "The budget holiday that was not", "We had agreed on hostels. {Who} booked a resort with my card and "
     "calls it a surprise.", "{Who} booked a costly resort with my card."),
    ("tifu", "Red sock, white wash", "{Who} does the laundry as a favour, though I asked {him} not to. All of my "
     "work shirts are pink.", "{Who} turned all of my work shirts pink."),
    ("AskReddit", "Spoiled the ending", "I waited a year for the last season. {Who} sent me the ending in a message "
     "with a laughing face.", "{Who} spoiled the ending of my favourite series.")]

OPENERS = ["Throwaway, because people I know read this.", "Long time reader, first post here.",
           "Sorry for the length.", "On mobile, so forgive the format.", "I never thought that I would write here.",
           "Names left out on purpose."]
FACTS = ["I am {age}, this has happened {count} times in {time}, the last time {days} days ago.",
         "For context: I am {age}, it is {time} now, {count} times in all, and {days} days since the last.",
         "It started {time} ago, I have counted {count} times, most recently {days} days ago, and I am {age}."]
CLOSERS = ["What would you do?", "Am I overreacting?", "How do I talk about this?", "Any advice is welcome.",
           "Has anybody been through the same?", "Thanks for reading this far."]

ARTICLES = [  # a news article and two summaries; the hub's validation file holds such rows, which have no post
    ("The town council voted on Tuesday to reopen the old swimming pool. It had been closed since a storm took off its "
     "roof. Repairs are to begin in spring, and entry will be free for children in the first summer.",
     "The council will reopen the pool that a storm damaged.", "The old pool reopens, free for children at first."),
    ("A ferry with ninety passengers ran aground in fog on Friday evening. Nobody was hurt. The captain said that the "
     "harbour lights had failed; the port authority has opened an inquiry.",
     "A ferry ran aground in fog, nobody was hurt.", "An inquiry will ask why the harbour lights had failed.")]

# ---------------------------------------------------------------------------------------------------------------------
# Material: how it is told. For each side of each attribute, beginnings and ends of a sentence, each fits each
# ---------------------------------------------------------------------------------------------------------------------

STYLES = {
    "detail": {
        +1: (["I am {age} and it has happened {count} times", "At {age} I have counted {count} times",
              "I, {age}, have been through it {count} times", "I turned {age} and have seen it {count} times",
              "I have been there {count} times at {age}"],
             ["in {time}, the last one {days} days ago.", "within {time}, most recently {days} days ago.",
              "over {time}, and {days} days ago once more.", "in {time}, with {days} days since the last.",
              "during {time}, and again {days} days ago."]),
        -1: (["It has been going on for some while", "There were some things before that",
              "It is a sort of habit by now", "Some stuff came up now and then", "It happens every so often somehow"],
             ["and some other stuff happened somehow.", "with various things in between, more or less.",
              "and things are sort of the same since.", "along with some stuff of that kind.",
              "and there is more of that sort somewhere."])},
    "warmth": {
        +1: (["It breaks my heart,", "I feel so hurt and lonely,", "My heart is heavy and I feel like crying,",
              "I feel sad and I care so much,", "With all my heart I feel for us both,"],
             ["because I love {him} and feel our bond is dear.", "and I only hope we can hug and heal, with love.",
              "since I love {him} dearly and feel {he} hurts as well.", "and we both deserve love and a kind heart.",
              "though I feel that love and a kind word would help."]),
        -1: (["For the record,", "Status of the matter:", "As stated in the report,", "On record at present:",
              "In terms of process,"],
             ["the issue remains open and no agreement exists.", "the matter is unresolved as of this report.",
              "the parties disagree and the issue is pending.", "no action was taken on the matter.",
              "a response to the issue is pending."])},
    "verdict": {
        +1: (["Verdict:", "Bottom line:", "No excuses,", "Simply put,", "Plain and simple,"],
             ["{he} is wrong and must stop this now!", "this is wrong, I must end it now!",
              "never again, {he} must pay or go now!", "enough, I must throw {him} out now!",
              "{he} will never change, I must stop it now!"]),
        -1: (["Perhaps", "Maybe", "It may be that", "Then again, perhaps", "Or maybe"],
             ["there are two sides and either might be fair.", "either view could be right, it might depend.",
              "one could wait, as it might depend on the mood.", "either of us could see it in a different light.",
              "the other side might see it differently."])},
}

# ---------------------------------------------------------------------------------------------------------------------
# Posts, responses, tastes: what the corpora and the tokenizer are made from
# ---------------------------------------------------------------------------------------------------------------------

PLANTED_RANK = 3
TASTES = np.array([[1.0, -0.6, 0.0], [0.0, 1.0, -0.6], [-0.6, 0.0, 1.0]])  # (PLANTED_RANK, attributes of STYLES)
CLEAR = 1.0  # the smallest difference in taste between two responses that a worker is asked about
NOISE = 0.01  # the share of choices that go against the worker's taste


def compose_posts(chance, situations=SITUATIONS, variants=2):
    """Write posts, and every style of response to each, from the material.

    chance: a random.Random. Returns a list of dicts: `title`, `post`, `subreddit`, and `responses`, a dict from the
    style (a tuple of +1 and -1, in the order of STYLES) to the text. A situation gives `variants` posts in a row.
    """
    posts = []
    for subreddit, title, story, gist in situations:
        for who, he, him, his in chance.sample(PEOPLE, variants):
            slots = {"who": who, "Who": who.capitalize(), "he": he, "He": he.capitalize(), "him": him, "his": his,
                     "age": chance.randint(19, 49), "count": chance.randint(3, 19), "days": chance.randint(2, 29),
                     "time": f"{chance.randint(2, 9)} {chance.choice(['months', 'years'])}"}
            post = " ".join([chance.choice(OPENERS), story, chance.choice(FACTS), chance.choice(CLOSERS)])
            responses = {}
            for style in itertools.product([1, -1], repeat=len(STYLES)):
                told = [" ".join(map(chance.choice, sides[side])) for sides, side in zip(STYLES.values(), style)]
                responses[style] = " ".join([gist, *told]).format(**slots)
            posts.append({"title": title.format(**slots), "post": post.format(**slots), "subreddit": subreddit,
                          "responses": responses})
    return posts


def plant_tastes(chance, names):
    """Give each worker a mixture over the rows of TASTES, at least 0.8 of it one of them: name -> float64 `[3]`.

    names: in the order in which the pipeline sorts them. Each third has one direction, by this order and not by chance,
    so that the pipeline's split, whose seed is fixed, leaves every direction to some seen and some unseen workers.
    """
    mixtures = {}
    for i, name in enumerate(names):
        direction = i * PLANTED_RANK // len(names)
        rest = np.array([chance.uniform(0, 0.2 / PLANTED_RANK) for _ in range(PLANTED_RANK)])
        mixtures[name] = rest + (1 - rest.sum()) * np.eye(PLANTED_RANK)[direction]
    return mixtures


def draw_comparison(chance, mixture):
    """Draw two styles that differ clearly for a worker's taste -> (first, second, preference).

    preference: positive where the worker chooses the second; the sign is wrong in a share NOISE of the draws.
    """
    styles = list(itertools.product([1, -1], repeat=len(STYLES)))
    while True:
        first, second = chance.sample(styles, 2)
        preference = float(mixture @ TASTES @ np.subtract(second, first))
        if abs(preference) >= CLEAR:
            return first, second, preference if chance.random() >= NOISE else -preference


# ---------------------------------------------------------------------------------------------------------------------
# Reward model
# ---------------------------------------------------------------------------------------------------------------------

# The padding is a token of its own: sequence classification scores the last token before it, and the template's
# end-of-turn tokens stand in the middle of a conversation too.
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# Standard deviations of the random weights, times sqrt(inputs). Flat attention and a weak MLP keep the last state near
# a mean over the words read; what attention writes is strong, so that the last token's own embedding does not drown it.
GAINS = {"embed_tokens": 1.0, "q_proj": 0.5, "k_proj": 0.5, "v_proj": 1.0, "o_proj": 2.0, "gate_proj": 0.3,
         "up_proj": 0.3, "down_proj": 0.3, "score": 1.0}


def build_tokenizer():
    """A byte-level BPE tokenizer, trained on the written material: it encodes any text, and its own in few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    posts = compose_posts(random.Random(0))
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator([text for post in posts for text in (post["post"], *post["responses"].values())], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
                                        pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_reward_model(folder, seed=0, hidden_size=64, layers=2, heads=4, key_value_heads=2, context=8192):
    """Write a tiny Llama reward model of random weights to `folder`: config, safetensors, tokenizer, chat template.

    hidden_size: d, a multiple of 2 * heads. Equal arguments give equal weights, in any process.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification, logging
    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads,
                         max_position_embeddings=context, num_labels=1, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):  # the class fills the weights from torch's global state first
        model = LlamaForSequenceClassification(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 2:  # the norms stay at 1
            layer = name.split(".")[-2]
            inputs = 1 if layer == "embed_tokens" else weight.shape[1]
            torch.nn.init.normal_(weight, std=GAINS[layer] / inputs ** 0.5, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Reddit TL;DR
# ---------------------------------------------------------------------------------------------------------------------

TLDR_WORKERS = 30
TLDR_PAIRS = {"train": (14, 18), "validation": (8, 12)}  # fewest and most comparisons of a worker
TLDR_TRAIN_SITUATIONS = 20  # the others are for validation, so its prompts are unseen
SMALL_WORKERS = (2, 3)  # comparisons of two further workers, whom the pipeline leaves out


def _tldr_row(texts, choice, worker, split, confidence=None, **info):
    """One comparison with every column of the hub's rows; those of `info` that are not given are null."""
    columns = dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"))
    return {"info": {**columns, **info},
            "summaries": [{"text": text, "policy": "written", "note": None} for text in texts],
            "choice": choice, "worker": worker, "batch": "demo", "split": split, "extra": {"confidence": confidence}}


def write_tldr_corpus(folder, seed=0):
    """Write `train.jsonl` and `validation.jsonl` to `folder`: about 800 comparisons by 32 workers, in the hub's schema.

    Both files have the same workers, each of whom sees a post at most once, and different situations. Validation also
    has four rows about news articles, without a post. Returns the planted tastes: worker -> mixture, float64 `[3]`.
    """
    chance = random.Random(seed)
    names = sorted("".join(chance.choices(string.ascii_lowercase, k=10))
                   for _ in range(TLDR_WORKERS + len(SMALL_WORKERS)))
    mixtures = {**plant_tastes(chance, names[:TLDR_WORKERS]), **plant_tastes(chance, names[TLDR_WORKERS:])}
    for split, situations in (("train", SITUATIONS[:TLDR_TRAIN_SITUATIONS]),
                              ("validation", SITUATIONS[TLDR_TRAIN_SITUATIONS:])):
        posts = compose_posts(chance, situations)
        pairs = [chance.randint(*TLDR_PAIRS[split]) for _ in range(TLDR_WORKERS)]
        rows = []
        for name, count in zip(names, [*pairs, *SMALL_WORKERS]):
            for number in chance.sample(range(len(posts)), count):
                post = posts[number]
                first, second, preference = draw_comparison(chance, mixtures[name])
                rows.append(_tldr_row([post["responses"][first], post["responses"][second]], int(preference > 0), name,
                                      split, round(5 + preference) if split == "validation" else None,
                                      id=f"{split}_{number:02}", post=post["post"], title=post["title"],
                                      subreddit=post["subreddit"]))
        if split == "validation":
            rows += [_tldr_row(summaries, chance.randint(0, 1), name, split, 5, id=f"article_{number}", site="cnn",
                               article=article)
                     for number, (article, *summaries) in enumerate(ARTICLES) for name in chance.sample(names, 2)]
        chance.shuffle(rows)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return mixtures
