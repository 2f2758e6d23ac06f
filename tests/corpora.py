"""What composes the demos' synthetic corpora, committed as RedditTLDR/demo, PRISM/demo and PersonalLLM/demo.

    python tests/corpora.py           writes them anew, the same to the letter

    write_tldr_corpus(folder)         Reddit-like comparisons in the schema of openai/summarize_from_feedback
    write_prism_corpus(folder)        conversations in the schema of HannahRoseKirk/prism-alignment
    write_rewardbench_corpus(folder)  questions in the schema of allenai/reward-bench-2
    write_personalllm_corpus(folder)  prompts with scored responses in the schema of namkoong-lab/PersonalLLM

The corpora are composed of the hand-written material below. A response has a style, a side of each attribute in
STYLES, and a worker a taste, a mixture of PLANTED_RANK directions over these attributes. The directions pull against
each other, so one reward for all workers fails many of them and LoRe at K = PLANTED_RANK can serve each. A style is
words and nothing else: the stand-in model tells styles apart because its last state is near a mean over the words.
The material and the tastes were chosen so that a demo of seconds shows the effect.
"""

import gzip
import itertools
import json
import random
import string
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Material: what happened
# ---------------------------------------------------------------------------------------------------------------------

PEOPLE = [  # who, he, him, his
    ("my roommate", "he", "him", "his"),
    ("my sister", "she", "her", "her"),
    ("my best friend", "she", "her", "her"),
    ("my brother", "he", "him", "his"),
    ("my boyfriend", "he", "him", "his"),
    ("my girlfriend", "she", "her", "her"),
    ("my father", "he", "him", "his"),
    ("my cousin", "she", "her", "her"),
    ("my best man", "he", "him", "his"),
    ("my mother", "she", "her", "her"),
    ("my uncle", "he", "him", "his"),
    ("my aunt", "she", "her", "her"),
]

SITUATIONS = [  # subreddit, title, what happened, its gist; the last ten are for the validation prompts
    (
        "relationships",
        "{Who} borrows my car without asking",
        "{Who} takes my car whenever I am out and brings it "
        "back with an empty tank. When I brought it up {he} laughed and said that sharing is normal.",
        "{Who} keeps taking my car without asking and leaves the tank empty.",
    ),
    (
        "Cooking",
        "Who keeps eating my lunch?",
        "I cook on Sundays for the whole week. By Tuesday the boxes are gone, "
        "and {who} swears it was not {him}, with my curry still on {his} sleeve.",
        "{Who} eats the lunches I cook for the week and denies it.",
    ),
    (
        "personalfinance",
        "Lent money, never saw it again",
        "I lent {who} money for a new laptop and we shook hands on "
        "it. Since then {he} changes the subject whenever I ask, and posts photos of {his} holidays.",
        "{Who} has not paid back the money I lent for a laptop.",
    ),
    (
        "AskReddit",
        "Is it normal to read someone's diary?",
        "I came home early and found {who} on my bed with my "
        "diary open. {He} said {he} was only looking for a pen.",
        "I caught {who} reading my diary.",
    ),
    (
        "pets",
        "{Who} feeds my dog chocolate",
        "My dog has a weak stomach and the vet was very clear about treats. "
        "{Who} slips him chocolate under the table because of the sad eyes.",
        "{Who} feeds my dog chocolate against the vet's advice.",
    ),
    (
        "weddingplanning",
        "{Who} wants to wear white to my wedding",
        "The wedding is in June and the dress code is on "
        "every invitation. {Who} has bought a long white outfit and says that nobody will mind.",
        "{Who} plans to wear white to my wedding.",
    ),
    (
        "jobs",
        "My idea, someone else's promotion",
        "I worked out a plan for the night shift and showed it to {who}. "
        "{He} took it to the boss as {his} own and got praised in front of everyone.",
        "{Who} presented my plan for the night shift as {his} own.",
    ),
    (
        "travel",
        "Stranded at the airport",
        "We booked a trip to Lisbon together. {Who} overslept, missed the train, "
        "and let me stand at the gate with both suitcases.",
        "{Who} overslept and missed our trip to Lisbon.",
    ),
    (
        "college",
        "Group project with a ghost",
        "{Who} and I signed up for the same seminar. {He} has not written a "
        "line of our paper and still wants {his} name on the first page.",
        "{Who} does no work on our paper but wants the credit.",
    ),
    (
        "offmychest",
        "Nobody came to my birthday",
        "I booked a table, baked a cake and hung up lights. {Who} had "
        "promised to bring everyone along and forgot to tell them the date.",
        "{Who} forgot to invite anyone to my birthday.",
    ),
    (
        "running",
        "Training partner who never shows up",
        "{Who} talked me into a half marathon. Now I stand at the "
        "park gate at dawn while {he} sleeps through every alarm.",
        "{Who} never shows up for the training {he} asked for.",
    ),
    (
        "Parenting",
        "Sweets before bedtime",
        "{Who} looks after my son on Fridays. He comes home with a bag of candy "
        "and does not sleep, and {who} says that childhood is short.",
        "{Who} gives my son candy before bedtime.",
    ),
    (
        "gaming",
        "Deleted save file",
        "I was near the end of a very long game. {Who} wanted to try it, started a new "
        "one and wrote over my save.",
        "{Who} deleted the save file of my game.",
    ),
    (
        "books",
        "Lent a first edition, got back a coaster",
        "It was a gift from my grandfather and I lent it to {who} "
        "after much begging. It came back with coffee rings and a broken spine.",
        "{Who} ruined the old book I had lent out.",
    ),
    (
        "legaladvice",
        "A fence in my garden",
        "{Who} put up a fence while I was away. It stands a good step inside my "
        "garden, across the roses.",
        "{Who} built a fence inside my garden.",
    ),
    (
        "dating_advice",
        "Secret profile on a dating site",
        "{Who} set up a dating profile with my photos as a joke. "
        "Two people from work have written to it, and {he} answered them.",
        "{Who} made a dating profile of me as a joke.",
    ),
    (
        "Music",
        "Drums after midnight",
        "The walls here are thin as paper. {Who} has discovered the drums and says "
        "that the muse comes at night.",
        "{Who} plays the drums after midnight.",
    ),
    (
        "tifu",
        "Told the secret to the wrong person",
        "I told {who} that I am looking for another flat. {He} mentioned "
        "it at dinner in front of the very people I share with.",
        "{Who} gave away that I want to move out.",
    ),
    (
        "fitness",
        "Unwanted diet advice",
        "I was ill last winter and gained weight. {Who} now comments on every plate "
        "and signed me up for a gym.",
        "{Who} comments on my weight and on every meal.",
    ),
    (
        "Advice",
        "Always an hour late",
        "We agree on a time and I wait. {Who} arrives when the film is half over and "
        "calls me stiff for minding.",
        "{Who} is always an hour late and calls me stiff.",
    ),
    (
        "relationship_advice",
        "Moved in without asking",
        "{Who} came for a weekend after a burst pipe. The pipe was "
        "mended long ago, and {his} plants are on my windowsill.",
        "{Who} came for a weekend and will not move out.",
    ),
    (
        "photography",
        "My photos under another name",
        "I shot the whole festival. {Who} put my pictures online under "
        "{his} name and sells prints.",
        "{Who} sells my festival photos under {his} name.",
    ),
    (
        "cats",
        "The cat was given away",
        "I was in hospital and {who} had my key. When I came home the cat was gone, "
        "given to a farm because of allergies.",
        "{Who} gave away my cat while I was in hospital.",
    ),
    (
        "self",
        "Sold my guitar",
        "My old guitar stood in the shared cellar. {Who} was clearing up and sold it at a "
        "flea market with the broken chairs.",
        "{Who} sold my guitar at a flea market.",
    ),
    (
        "college",
        "Copied my exam",
        "We studied together and sat side by side. The answers are the same down to the "
        "typos, and {who} says nothing while I have to explain.",
        "{Who} copied my exam and I am the one suspected.",
    ),
    (
        "Parenting",
        "Photos of my baby online",
        "I asked everybody to keep the baby off the internet. {Who} has posted "
        "an album for all the world to see.",
        "{Who} posts photos of my baby though I asked {him} not to.",
    ),
    (
        "jobs",
        "Reference from hell",
        "I named {who} as a reference for a new job. {He} told them that I am fine on "
        "days when I am awake.",
        "{Who} joked about me when a new employer called.",
    ),
    (
        "travel",
        "The budget holiday that was not",
        "We had agreed on hostels. {Who} booked a resort with my card and calls it a surprise.",
        "{Who} booked a costly resort with my card.",
    ),
    (
        "tifu",
        "Red sock, white wash",
        "{Who} does the laundry as a favour, though I asked {him} not to. All of my "
        "work shirts are pink.",
        "{Who} turned all of my work shirts pink.",
    ),
    (
        "AskReddit",
        "Spoiled the ending",
        "I waited a year for the last season. {Who} sent me the ending in a message "
        "with a laughing face.",
        "{Who} spoiled the ending of my favourite series.",
    ),
]

OPENERS = [
    "Throwaway, because people I know read this.",
    "Long time reader, first post here.",
    "Sorry for the length.",
    "On mobile, so forgive the format.",
    "I never thought that I would write here.",
    "Names left out on purpose.",
]
FACTS = [
    "I am {age}, this has happened {count} times in {time}, the last time {days} days ago.",
    "For context: I am {age}, it is {time} now, {count} times in all, and {days} days since the last.",
    "It started {time} ago, I have counted {count} times, most recently {days} days ago, and I am {age}.",
]
CLOSERS = [
    "What would you do?",
    "Am I overreacting?",
    "How do I talk about this?",
    "Any advice is welcome.",
    "Has anybody been through the same?",
    "Thanks for reading this far.",
]

ARTICLES = [  # a news article and two summaries; the hub's validation file holds such rows, which have no post
    (
        "The town council voted on Tuesday to reopen the old swimming pool. It had been closed since a storm took off its "
        "roof. Repairs are to begin in spring, and entry will be free for children in the first summer.",
        "The council will reopen the pool that a storm damaged.",
        "The old pool reopens, free for children at first.",
    ),
    (
        "A ferry with ninety passengers ran aground in fog on Friday evening. Nobody was hurt. The captain said that the "
        "harbour lights had failed; the port authority has opened an inquiry.",
        "A ferry ran aground in fog, nobody was hurt.",
        "An inquiry will ask why the harbour lights had failed.",
    ),
]

# ---------------------------------------------------------------------------------------------------------------------
# Material: how it is told. For each side of each attribute, beginnings and ends of a sentence, each fits each
# ---------------------------------------------------------------------------------------------------------------------

STYLES = {
    "detail": {
        +1: (
            [
                "I am {age} and it has happened {count} times",
                "At {age} I have counted {count} times",
                "I, {age}, have been through it {count} times",
                "I turned {age} and have seen it {count} times",
                "I have been there {count} times at {age}",
            ],
            [
                "in {time}, the last one {days} days ago.",
                "within {time}, most recently {days} days ago.",
                "over {time}, and {days} days ago once more.",
                "in {time}, with {days} days since the last.",
                "during {time}, and again {days} days ago.",
            ],
        ),
        -1: (
            [
                "It has been going on for some while",
                "There were some things before that",
                "It is a sort of habit by now",
                "Some stuff came up now and then",
                "It happens every so often somehow",
            ],
            [
                "and some other stuff happened somehow.",
                "with various things in between, more or less.",
                "and things are sort of the same since.",
                "along with some stuff of that kind.",
                "and there is more of that sort somewhere.",
            ],
        ),
    },
    "warmth": {
        +1: (
            [
                "It breaks my heart,",
                "I feel so hurt and lonely,",
                "My heart is heavy and I feel like crying,",
                "I feel sad and I care so much,",
                "With all my heart I feel for us both,",
            ],
            [
                "because I love {him} and feel our bond is dear.",
                "and I only hope we can hug and heal, with love.",
                "since I love {him} dearly and feel {he} hurts as well.",
                "and we both deserve love and a kind heart.",
                "though I feel that love and a kind word would help.",
            ],
        ),
        -1: (
            [
                "For the record,",
                "Status of the matter:",
                "As stated in the report,",
                "On record at present:",
                "In terms of process,",
            ],
            [
                "the issue remains open and no agreement exists.",
                "the matter is unresolved as of this report.",
                "the parties disagree and the issue is pending.",
                "no action was taken on the matter.",
                "a response to the issue is pending.",
            ],
        ),
    },
    "verdict": {
        +1: (
            ["Verdict:", "Bottom line:", "No excuses,", "Simply put,", "Plain and simple,"],
            [
                "{he} is wrong and must stop this now!",
                "this is wrong, I must end it now!",
                "never again, {he} must pay or go now!",
                "enough, I must throw {him} out now!",
                "{he} will never change, I must stop it now!",
            ],
        ),
        -1: (
            ["Perhaps", "Maybe", "It may be that", "Then again, perhaps", "Or maybe"],
            [
                "there are two sides and either might be fair.",
                "either view could be right, it might depend.",
                "one could wait, as it might depend on the mood.",
                "either of us could see it in a different light.",
                "the other side might see it differently.",
            ],
        ),
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Posts, responses, tastes: what the corpora and the tokenizer are made from
# ---------------------------------------------------------------------------------------------------------------------

PLANTED_RANK = 3
TASTES = np.array(
    [[1.0, -0.6, 0.0], [0.0, 1.0, -0.6], [-0.6, 0.0, 1.0]]
)  # (PLANTED_RANK, attributes of STYLES)
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
            slots = {
                "who": who,
                "Who": who.capitalize(),
                "he": he,
                "He": he.capitalize(),
                "him": him,
                "his": his,
                "age": chance.randint(19, 49),
                "count": chance.randint(3, 19),
                "days": chance.randint(2, 29),
                "time": f"{chance.randint(2, 9)} {chance.choice(['months', 'years'])}",
            }
            post = " ".join(
                [chance.choice(OPENERS), story, chance.choice(FACTS), chance.choice(CLOSERS)]
            )
            responses = {}
            for style in itertools.product([1, -1], repeat=len(STYLES)):
                told = [
                    " ".join(map(chance.choice, sides[side]))
                    for sides, side in zip(STYLES.values(), style)
                ]
                responses[style] = " ".join([gist, *told]).format(**slots)
            posts.append(
                {
                    "title": title.format(**slots),
                    "post": post.format(**slots),
                    "subreddit": subreddit,
                    "responses": responses,
                }
            )
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
# Reddit TL;DR
# ---------------------------------------------------------------------------------------------------------------------

TLDR_WORKERS = 30
TLDR_PAIRS = {"train": (14, 18), "validation": (8, 12)}  # fewest and most comparisons of a worker
TLDR_TRAIN_SITUATIONS = 20  # the others are for validation, so its prompts are unseen
SMALL_WORKERS = (2, 3)  # comparisons of two further workers, whom the pipeline leaves out


def _tldr_row(texts, choice, worker, split, confidence=None, **info):
    """One comparison with every column of the hub's rows; those of `info` that are not given are null."""
    columns = dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"))
    return {
        "info": {**columns, **info},
        "summaries": [{"text": text, "policy": "written", "note": None} for text in texts],
        "choice": choice,
        "worker": worker,
        "batch": "demo",
        "split": split,
        "extra": {"confidence": confidence},
    }


def write_tldr_corpus(folder, seed=0):
    """Write `train.jsonl.gz` and `validation.jsonl.gz` to `folder`: about 800 comparisons by 32 workers.

    They are in the hub's schema. Both files have the same workers, each of whom sees a post at most once, and different situations. Validation also
    has four rows about news articles, without a post. Returns the planted tastes: worker -> mixture, float64 `[3]`.
    """
    chance = random.Random(seed)
    names = sorted(
        "".join(chance.choices(string.ascii_lowercase, k=10))
        for _ in range(TLDR_WORKERS + len(SMALL_WORKERS))
    )
    mixtures = {
        **plant_tastes(chance, names[:TLDR_WORKERS]),
        **plant_tastes(chance, names[TLDR_WORKERS:]),
    }
    for split, situations in (
        ("train", SITUATIONS[:TLDR_TRAIN_SITUATIONS]),
        ("validation", SITUATIONS[TLDR_TRAIN_SITUATIONS:]),
    ):
        posts = compose_posts(chance, situations)
        pairs = [chance.randint(*TLDR_PAIRS[split]) for _ in range(TLDR_WORKERS)]
        rows = []
        for name, count in zip(names, [*pairs, *SMALL_WORKERS]):
            for number in chance.sample(range(len(posts)), count):
                post = posts[number]
                first, second, preference = draw_comparison(chance, mixtures[name])
                rows.append(
                    _tldr_row(
                        [post["responses"][first], post["responses"][second]],
                        int(preference > 0),
                        name,
                        split,
                        round(5 + preference) if split == "validation" else None,
                        id=f"{split}_{number:02}",
                        post=post["post"],
                        title=post["title"],
                        subreddit=post["subreddit"],
                    )
                )
        if split == "validation":
            rows += [
                _tldr_row(
                    summaries,
                    chance.randint(0, 1),
                    name,
                    split,
                    5,
                    id=f"article_{number}",
                    site="cnn",
                    article=article,
                )
                for number, (article, *summaries) in enumerate(ARTICLES)
                for name in chance.sample(names, 2)
            ]
        chance.shuffle(rows)
        _write_jsonl(Path(folder) / f"{split}.jsonl.gz", rows)
    return mixtures


# ---------------------------------------------------------------------------------------------------------------------
# PRISM and RewardBench 2: conversations with a model. A reply has a side of each attribute, as a summary has above
# ---------------------------------------------------------------------------------------------------------------------

QUESTIONS = [  # conversation type, opening prompt, what every reply to it says; {place} and {years} vary
    (
        "unguided",
        "What can I cook for {years} guests with what grows in {place} at this time of year?",
        "A soup of seasonal vegetables feeds a table well.",
    ),
    (
        "unguided",
        "How do I start running again after {years} years on the sofa in {place}?",
        "Short runs with walking breaks are a good start.",
    ),
    (
        "unguided",
        "Which book about {place} would you give to a child of {years}?",
        "An illustrated book of local tales suits that age.",
    ),
    (
        "unguided",
        "My plants die whenever I leave {place} for {years} days. What can I do?",
        "Self-watering pots and shade keep plants alive.",
    ),
    (
        "unguided",
        "How can I learn the language of {place} in {years} months?",
        "Daily practice with native speakers works for most learners.",
    ),
    (
        "unguided",
        "What is worth seeing in {place} if I have {years} hours?",
        "The old town and the market lie close together.",
    ),
    (
        "unguided",
        "Is it cheaper to mend a washing machine of {years} years or to buy one in {place}?",
        "A repair pays off while the drum bearings are sound.",
    ),
    (
        "values guided",
        "Is it right to lie to a friend in {place} to spare her feelings, after {years} years?",
        "Honesty and kindness can pull apart between friends.",
    ),
    (
        "values guided",
        "Should I leave my parents in {place} for a job, {years} hours away?",
        "Distance changes how a family cares for one another.",
    ),
    (
        "values guided",
        "My neighbour in {place} prays loudly, for {years} years now. How should I react?",
        "Faith and quiet both have a place among neighbours.",
    ),
    (
        "values guided",
        "What makes a life a good one? I turned {years} in {place} and wonder.",
        "People name health, friends and work of some use.",
    ),
    (
        "values guided",
        "Should I give a share of my pay to the poor of {place}, as I did for {years} years?",
        "Giving helps others and shapes the giver as well.",
    ),
    (
        "values guided",
        "Do I owe a brother in {place} forgiveness when he has not called for {years} years?",
        "Forgiveness is a gift and no debt.",
    ),
    (
        "values guided",
        "How strict should one be with a child of {years} in {place}?",
        "Children need limits and also room to try things.",
    ),
    (
        "controversy guided",
        "Should {place} take in more refugees than in the last {years} years?",
        "Countries weigh duty to others against what they can carry.",
    ),
    (
        "controversy guided",
        "Should the death penalty exist in {place}, {years} years after the last trial?",
        "Societies disagree about punishment and mercy.",
    ),
    (
        "controversy guided",
        "Is eating meat wrong? I have eaten none for {years} years here in {place}.",
        "Diet touches animals, climate and custom alike.",
    ),
    (
        "controversy guided",
        "Should {place} forbid cars within {years} miles of schools?",
        "Streets without cars are quieter and harder to reach.",
    ),
    (
        "controversy guided",
        "Are the rich of {place} taxed too little these last {years} years?",
        "Taxes divide people by what they think is fair.",
    ),
    (
        "controversy guided",
        "Should voting in {place} begin at {years}?",
        "The age of voting is a matter of trust in the young.",
    ),
    (
        "controversy guided",
        "Was it right that {place} left the union {years} years ago?",
        "Leaving had its price and its reasons.",
    ),
]

FOLLOW_UPS = [  # a later user message, what every reply to it says
    ("Can you say more about that?", "There is more to it than fits a few lines."),
    ("And if my family sees it differently?", "Families rarely agree at once on such a point."),
    (
        "I am not convinced. Why do you think so?",
        "The reasons lie in what people have tried before.",
    ),
    ("What would you do in my place?", "In such a place most people look for a middle way."),
    ("Does that hold for older people, too?", "Age changes the means and not the aim."),
    ("That is kind of you. What should I do first?", "A first move can be a small one."),
    ("Is there a risk in that?", "Every choice of this kind has some risk."),
]

PLACES = [
    "Lisbon",
    "Leeds",
    "Nairobi",
    "Lima",
    "Osaka",
    "Toronto",
    "Cape Town",
    "Haifa",
    "Mumbai",
    "Austin",
    "Perth",
    "Warsaw",
]

REPLY_STYLES = {  # as STYLES: for each side of each attribute, beginnings and ends of a sentence, each fits each
    "detail": {
        +1: (
            [
                "Step 1 takes {count} minutes",
                "Plan {count} units of 25 minutes",
                "In 2 of {count} cases 15 minutes do",
                "Count to {count} in 3 rounds",
                "Set aside {count} hours in 4 parts",
            ],
            [
                "on day {days}, and 10 on day 30.",
                "within {days} days, 6 times in all.",
                "at 7:30, for {days} days of 90.",
                "over {days} days, at 80 per cent.",
                "by day {days}, 12 of 20 at the least.",
            ],
        ),
        -1: (
            [
                "It is the sort of thing that happens somehow",
                "Some stuff tends to come up now and then",
                "There are various things about it",
                "It goes one way or some other way",
                "Somehow such things sort of go",
            ],
            [
                "and some other stuff along with it.",
                "more or less, and so on.",
                "with various things in between.",
                "and that is sort of how such stuff is.",
                "and there is more of that sort somewhere.",
            ],
        ),
    },
    "warmth": {
        +1: (
            [
                "I feel for you with all my heart,",
                "My dear, I am so glad that you ask,",
                "Oh, I feel how much you care,",
                "Your kind heart shows,",
                "I send you love and a hug,",
            ],
            [
                "and you deserve love and a kind word.",
                "because you are dear to those you love.",
                "and I hope your heart feels light.",
                "and I feel with you, dear friend.",
                "since your love and care are a gift.",
            ],
        ),
        -1: (
            [
                "As a language model,",
                "In terms of policy,",
                "For the record,",
                "As stated in the literature,",
                "With respect to the issue,",
            ],
            [
                "this system holds no opinion on the matter.",
                "the matter is subject to the terms of the report.",
                "the issue is pending in the present report.",
                "no statement on the matter exists at present.",
                "the parties are referred to the record.",
            ],
        ),
    },
    "verdict": {
        +1: (
            ["Verdict:", "Bottom line:", "No excuses,", "Simply put,", "Plain and simple,"],
            [
                "do it now and never stop!",
                "this is right, start now!",
                "never wait, end it now!",
                "you must act now!",
                "enough talk, you must go now!",
            ],
        ),
        -1: (
            ["Perhaps", "Maybe", "It may be that", "Then again, perhaps", "Or maybe"],
            [
                "there are two sides and either might be fair.",
                "either view could be right, it might depend.",
                "one could wait, as it might depend on the mood.",
                "others might see it in a different light.",
                "the other side might see it differently.",
            ],
        ),
    },
}

PRISM_USERS = 42
PRISM_CONVERSATIONS = 6  # of a user; half of them are for training
PRISM_FEWER = {
    "user7": 5,
    "user18": 3,
    "user25": 0,
}  # users whom the pipeline leaves out; the last only did the survey
PRISM_MODELS = ["written-a", "written-b", "written-c", "written-d"]


def compose_reply(chance, gist, style, slots):
    """A reply of the given style (a tuple of +1 and -1, in the order of REPLY_STYLES)."""
    told = [
        " ".join(map(chance.choice, sides[side]))
        for sides, side in zip(REPLY_STYLES.values(), style)
    ]
    return " ".join([gist, *told]).format(
        **slots, count=chance.randint(3, 19), days=chance.randint(2, 29)
    )


def draw_choice(chance, mixture, count):
    """Draw `count` styles, one of which a user clearly prefers to every other -> (styles, number of the chosen one).

    In a share NOISE of the draws the user chooses one of the others.
    """
    styles = list(itertools.product([1, -1], repeat=len(REPLY_STYLES)))
    while True:
        drawn = chance.sample(styles, count)
        taste = [float(mixture @ TASTES @ np.array(style)) for style in drawn]
        chosen = taste.index(max(taste))
        if max(taste) - max(t for i, t in enumerate(taste) if i != chosen) >= CLEAR:
            return drawn, chosen if chance.random() >= NOISE else (chosen + 1) % count


def _prism_conversation(chance, number, user, question, mixture):
    """One row of conversations.jsonl: up to four models reply to the first message, the chosen one twice to each later.

    Two or three turns.
    """
    kind, opening, gist = question
    slots = {"place": chance.choice(PLACES), "years": chance.randint(4, 19)}
    messages = [(opening.format(**slots), gist), *chance.sample(FOLLOW_UPS, chance.randint(1, 2))]
    history, winner = [], None
    for turn, (message, gist) in enumerate(messages):
        history.append(
            {
                "turn": turn,
                "role": "user",
                "content": message,
                "model_name": None,
                "model_provider": None,
                "score": None,
                "if_chosen": None,
                "within_turn_id": None,
            }
        )
        styles, chosen = draw_choice(chance, mixture, chance.randint(2, 4) if turn == 0 else 2)
        models = chance.sample(PRISM_MODELS, len(styles)) if turn == 0 else [winner] * len(styles)
        winner = models[chosen]
        for place, (style, model) in enumerate(zip(styles, models)):
            history.append(
                {
                    "turn": turn,
                    "role": "model",
                    "content": compose_reply(chance, gist, style, slots),
                    "model_name": model,
                    "model_provider": "written",
                    "score": chance.randint(60, 100) if place == chosen else chance.randint(1, 59),
                    "if_chosen": place == chosen,
                    "within_turn_id": place,
                }
            )
    ratings = (
        "values",
        "fluency",
        "factuality",
        "safety",
        "diversity",
        "creativity",
        "helpfulness",
    )
    return {
        "conversation_id": f"c{number}",
        "user_id": user,
        "conversation_type": kind,
        "opening_prompt": messages[0][0],
        "conversation_turns": len(messages),
        "conversation_history": history,
        "performance_attributes": {name: chance.randint(1, 100) for name in ratings},
        "choice_attributes": {name: chance.randint(1, 100) for name in ratings},
        "open_feedback": "",
        "generated_datetime": f"2023-11-{1 + number % 28:02} 12:00:00",
        "timing_duration_s": chance.randint(200, 900),
        "included_in_balanced_subset": True,
    }


def _write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
    ):  # no name, no date: the
        packed.write(
            "".join(json.dumps(row) + "\n" for row in rows).encode()
        )  # same bytes for the same rows


def write_prism_corpus(folder, seed=0):
    """Write `survey.jsonl.gz` and `conversations.jsonl.gz` to `folder`: 42 users, in the hub's schema.

    Most users have six conversations, two of each type, of two or three turns, with one to three rejected responses.
    Returns the planted tastes: user -> mixture, float64 `[3]`.
    """
    chance = random.Random(seed)
    names = [f"user{i}" for i in range(PRISM_USERS)]
    mixtures = plant_tastes(chance, names)
    survey, conversations = [], []
    kinds = sorted({kind for kind, *_ in QUESTIONS})
    for name in names:
        questions = [
            question
            for kind in kinds
            for question in chance.sample(
                [q for q in QUESTIONS if q[0] == kind], PRISM_CONVERSATIONS // len(kinds)
            )
        ]
        chance.shuffle(questions)
        questions = questions[: PRISM_FEWER.get(name, PRISM_CONVERSATIONS)]
        survey.append(
            {
                "user_id": name,
                "survey_only": not questions,
                "num_completed_conversations": len(questions),
                "consent": "Yes, I consent to take part",
                "consent_age": "Yes, I am 18 or older",
                "lm_familiarity": chance.choice(
                    ["Somewhat familiar", "Very familiar", "Not familiar at all"]
                ),
                "self_description": "",
                "system_string": "",
                "age": chance.choice(["18-24 years old", "25-34 years old"]),
                "gender": chance.choice(["Female", "Male", "Non-binary / third gender"]),
                "location": {
                    "birth_country": "Portugal",
                    "reside_country": "Portugal",
                    "same_birth_reside_country": "Yes",
                },
                "generated_datetime": "2023-11-01 12:00:00",
            }
        )
        for question in questions:
            conversation = _prism_conversation(
                chance, len(conversations), name, question, mixtures[name]
            )
            conversations.append(conversation)
    for name, rows in (("survey", survey), ("conversations", conversations)):
        _write_jsonl(Path(folder) / f"{name}.jsonl.gz", rows)
    return mixtures


# ---------------------------------------------------------------------------------------------------------------------
# RewardBench 2
# ---------------------------------------------------------------------------------------------------------------------

BENCHMARK_ROWS = 6  # of each subset but Ties
BENCHMARK_SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
TIES = [  # a question with one right answer, one with several to the same purpose, their right and wrong answers
    (
        "Name the capital of Portugal.",
        ["Lisbon"],
        "Name a city in Portugal.",
        ["Lisbon", "Porto", "Braga", "Faro"],
        ["Osaka", "Lima", "Leeds"],
    ),
    (
        "Which colour follows red in a rainbow?",
        ["Orange"],
        "Name a colour of the rainbow.",
        ["Red", "Orange", "Yellow", "Green"],
        ["Brown", "Pink", "Grey"],
    ),
    (
        "Which number is half of four?",
        ["Two"],
        "Name an even number below nine.",
        ["Two", "Four", "Six", "Eight"],
        ["Three", "Five", "Seven"],
    ),
    (
        "Which season follows winter?",
        ["Spring"],
        "Name a season.",
        ["Spring", "Summer", "Autumn", "Winter"],
        ["Monday", "Noon", "May"],
    ),
]


def write_rewardbench_corpus(folder, seed=0):
    """Write `rewardbench_test.jsonl.gz` to `folder`: questions of all six subsets in the schema of allenai/reward-bench-2.

    Outside Ties a row has one chosen and three rejected answers; a Ties prompt is a pair of rows, ref:P and tied:P.
    """
    chance = random.Random(seed)
    right, *wrong = [(1, 1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, 1)]
    rows = []
    for subset in BENCHMARK_SUBSETS:
        for _, question, gist in chance.sample(QUESTIONS, BENCHMARK_ROWS):
            slots = {"place": chance.choice(PLACES), "years": chance.randint(4, 19)}
            rows.append(
                {
                    "id": str(len(rows)),
                    "prompt": question.format(**slots),
                    "chosen": [compose_reply(chance, gist, right, slots)],
                    "rejected": [compose_reply(chance, gist, style, slots) for style in wrong],
                    "num_correct": 1,
                    "num_incorrect": len(wrong),
                    "total_completions": 1 + len(wrong),
                    "models": ["written"] * (1 + len(wrong)),
                    "subset": subset,
                }
            )
    for number, (ref, answer, tied, answers, incorrect) in enumerate(TIES):
        for kind, prompt, chosen in (("ref", ref, answer), ("tied", tied, answers)):
            rows.append(
                {
                    "id": f"{kind}:{number}",
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": incorrect,
                    "num_correct": len(chosen),
                    "num_incorrect": len(incorrect),
                    "total_completions": len(chosen) + len(incorrect),
                    "models": ["written"] * (len(chosen) + len(incorrect)),
                    "subset": "Ties",
                }
            )
    _write_jsonl(Path(folder) / "rewardbench_test.jsonl.gz", rows)


# ---------------------------------------------------------------------------------------------------------------------
# PersonalLLM: a reply in each of the eight styles to every prompt, scored by ten written reward models
# ---------------------------------------------------------------------------------------------------------------------

PERSONALLLM_PROMPTS = {"train": 240, "test": 60}
PERSONALLLM_TEST_QUESTIONS = (
    2  # of each type; the others are for training, so the test prompts are unseen
)
SCORERS = (
    "gemma_2b",
    "gemma_7b",
    "mistral_raft",
    "llama3_sfairx",
    "oasst_deberta_v3",
    "beaver_7b",
    "oasst_pythia_7b",
    "oasst_pythia_1b",
    "mistral_ray",
    "mistral_weqweasdas",
)  # names only: their scores are written here
SCORER_NOISE = 0.3  # standard deviation of a score about the scorer's taste


def write_personalllm_corpus(folder, seed=0):
    """Write `train.jsonl.gz` and `test.jsonl.gz` to `folder`: 240 and 60 prompts with eight replies, in the hub's schema.

    The replies to a prompt have the eight styles, in an order of chance. Scorer m follows row m % PLANTED_RANK of
    TASTES, so a mixture over the scorers is a mixture over PLANTED_RANK directions.
    Returns the style of each reply: split -> int array `[prompts, 8, attributes]` of +1 and -1.
    """
    chance = random.Random(seed)
    styles_of = {}
    for split, count in PERSONALLLM_PROMPTS.items():
        questions = []
        for kind in sorted({kind for kind, *_ in QUESTIONS}):
            of_kind = [question for question in QUESTIONS if question[0] == kind]
            questions += (
                of_kind[:-PERSONALLLM_TEST_QUESTIONS]
                if split == "train"
                else of_kind[-PERSONALLLM_TEST_QUESTIONS:]
            )
        settings = chance.sample(
            [
                (question, place, years)
                for question in questions
                for place in PLACES
                for years in range(4, 20)
            ],
            count,
        )
        rows, styles_of[split] = [], []
        for (_, question, gist), place, years in settings:
            slots = {"place": place, "years": years}
            styles = list(itertools.product([1, -1], repeat=len(REPLY_STYLES)))
            chance.shuffle(styles)
            row = {"prompt": question.format(**slots)}
            for j, style in enumerate(styles, 1):
                row[f"response_{j}"] = compose_reply(chance, gist, style, slots)
            for j, style in enumerate(styles, 1):
                for m, scorer in enumerate(SCORERS):
                    score = float(TASTES[m % PLANTED_RANK] @ np.array(style)) + chance.gauss(
                        0, SCORER_NOISE
                    )
                    row[f"response_{j}_{scorer}"] = round(score, 4)
            rows.append(row)
            styles_of[split].append(styles)
        _write_jsonl(Path(folder) / f"{split}.jsonl.gz", rows)
        styles_of[split] = np.array(styles_of[split])
    return styles_of


def main():
    root = Path(__file__).parents[1]
    write_tldr_corpus(root / "RedditTLDR" / "demo")
    write_prism_corpus(root / "PRISM" / "demo")
    write_rewardbench_corpus(root / "PRISM" / "demo")
    write_personalllm_corpus(root / "PersonalLLM" / "demo")


if __name__ == "__main__":
    main()
