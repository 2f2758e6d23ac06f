"""The hand-written material of which corpora.py composes the demos' data.

A part in braces, such as {who} or {place}, is filled in by corpora.py.
"""

# ---- Reddit TL;DR: what happened

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

# Subreddit, title, what happened, its gist. The last ten are for the validation prompts.
SITUATIONS = [
    (
        "relationships",
        "{Who} borrows my car without asking",
        "{Who} takes my car whenever I am out and brings it back with an empty tank. When I "
        "brought it up {he} laughed and said that sharing is normal.",
        "{Who} keeps taking my car without asking and leaves the tank empty.",
    ),
    (
        "Cooking",
        "Who keeps eating my lunch?",
        "I cook on Sundays for the whole week. By Tuesday the boxes are gone, and {who} "
        "swears it was not {him}, with my curry still on {his} sleeve.",
        "{Who} eats the lunches I cook for the week and denies it.",
    ),
    (
        "personalfinance",
        "Lent money, never saw it again",
        "I lent {who} money for a new laptop and we shook hands on it. Since then {he} "
        "changes the subject whenever I ask, and posts photos of {his} holidays.",
        "{Who} has not paid back the money I lent for a laptop.",
    ),
    (
        "AskReddit",
        "Is it normal to read someone's diary?",
        "I came home early and found {who} on my bed with my diary open. {He} said {he} was "
        "only looking for a pen.",
        "I caught {who} reading my diary.",
    ),
    (
        "pets",
        "{Who} feeds my dog chocolate",
        "My dog has a weak stomach and the vet was very clear about treats. {Who} slips him "
        "chocolate under the table because of the sad eyes.",
        "{Who} feeds my dog chocolate against the vet's advice.",
    ),
    (
        "weddingplanning",
        "{Who} wants to wear white to my wedding",
        "The wedding is in June and the dress code is on every invitation. {Who} has bought a"
        " long white outfit and says that nobody will mind.",
        "{Who} plans to wear white to my wedding.",
    ),
    (
        "jobs",
        "My idea, someone else's promotion",
        "I worked out a plan for the night shift and showed it to {who}. {He} took it to the "
        "boss as {his} own and got praised in front of everyone.",
        "{Who} presented my plan for the night shift as {his} own.",
    ),
    (
        "travel",
        "Stranded at the airport",
        "We booked a trip to Lisbon together. {Who} overslept, missed the train, and let me "
        "stand at the gate with both suitcases.",
        "{Who} overslept and missed our trip to Lisbon.",
    ),
    (
        "college",
        "Group project with a ghost",
        "{Who} and I signed up for the same seminar. {He} has not written a line of our paper"
        " and still wants {his} name on the first page.",
        "{Who} does no work on our paper but wants the credit.",
    ),
    (
        "offmychest",
        "Nobody came to my birthday",
        "I booked a table, baked a cake and hung up lights. {Who} had promised to bring "
        "everyone along and forgot to tell them the date.",
        "{Who} forgot to invite anyone to my birthday.",
    ),
    (
        "running",
        "Training partner who never shows up",
        "{Who} talked me into a half marathon. Now I stand at the park gate at dawn while "
        "{he} sleeps through every alarm.",
        "{Who} never shows up for the training {he} asked for.",
    ),
    (
        "Parenting",
        "Sweets before bedtime",
        "{Who} looks after my son on Fridays. He comes home with a bag of candy and does not "
        "sleep, and {who} says that childhood is short.",
        "{Who} gives my son candy before bedtime.",
    ),
    (
        "gaming",
        "Deleted save file",
        "I was near the end of a very long game. {Who} wanted to try it, started a new one "
        "and wrote over my save.",
        "{Who} deleted the save file of my game.",
    ),
    (
        "books",
        "Lent a first edition, got back a coaster",
        "It was a gift from my grandfather and I lent it to {who} after much begging. It came"
        " back with coffee rings and a broken spine.",
        "{Who} ruined the old book I had lent out.",
    ),
    (
        "legaladvice",
        "A fence in my garden",
        "{Who} put up a fence while I was away. It stands a good step inside my garden, "
        "across the roses.",
        "{Who} built a fence inside my garden.",
    ),
    (
        "dating_advice",
        "Secret profile on a dating site",
        "{Who} set up a dating profile with my photos as a joke. Two people from work have "
        "written to it, and {he} answered them.",
        "{Who} made a dating profile of me as a joke.",
    ),
    (
        "Music",
        "Drums after midnight",
        "The walls here are thin as paper. {Who} has discovered the drums and says that the "
        "muse comes at night.",
        "{Who} plays the drums after midnight.",
    ),
    (
        "tifu",
        "Told the secret to the wrong person",
        "I told {who} that I am looking for another flat. {He} mentioned it at dinner in "
        "front of the very people I share with.",
        "{Who} gave away that I want to move out.",
    ),
    (
        "fitness",
        "Unwanted diet advice",
        "I was ill last winter and gained weight. {Who} now comments on every plate and "
        "signed me up for a gym.",
        "{Who} comments on my weight and on every meal.",
    ),
    (
        "Advice",
        "Always an hour late",
        "We agree on a time and I wait. {Who} arrives when the film is half over and calls me"
        " stiff for minding.",
        "{Who} is always an hour late and calls me stiff.",
    ),
    (
        "relationship_advice",
        "Moved in without asking",
        "{Who} came for a weekend after a burst pipe. The pipe was mended long ago, and {his}"
        " plants are on my windowsill.",
        "{Who} came for a weekend and will not move out.",
    ),
    (
        "photography",
        "My photos under another name",
        "I shot the whole festival. {Who} put my pictures online under {his} name and sells "
        "prints.",
        "{Who} sells my festival photos under {his} name.",
    ),
    (
        "cats",
        "The cat was given away",
        "I was in hospital and {who} had my key. When I came home the cat was gone, given to "
        "a farm because of allergies.",
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
        "I asked everybody to keep the baby off the internet. {Who} has posted an album for "
        "all the world to see.",
        "{Who} posts photos of my baby though I asked {him} not to.",
    ),
    (
        "jobs",
        "Reference from hell",
        "I named {who} as a reference for a new job. {He} told them that I am fine on days "
        "when I am awake.",
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
        "{Who} does the laundry as a favour, though I asked {him} not to. All of my work "
        "shirts are pink.",
        "{Who} turned all of my work shirts pink.",
    ),
    (
        "AskReddit",
        "Spoiled the ending",
        "I waited a year for the last season. {Who} sent me the ending in a message with a "
        "laughing face.",
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
    "For context: I am {age}, it is {time} now, {count} times in all, and {days} days since the "
    "last.",
    "It started {time} ago, I have counted {count} times, most recently {days} days ago, and I am "
    "{age}.",
]
CLOSERS = [
    "What would you do?",
    "Am I overreacting?",
    "How do I talk about this?",
    "Any advice is welcome.",
    "Has anybody been through the same?",
    "Thanks for reading this far.",
]

# A news article and two summaries of it. The hub's validation file has such rows, without a post.
ARTICLES = [
    (
        "The town council voted on Tuesday to reopen the old swimming pool. It had been "
        "closed since a storm took off its roof. Repairs are to begin in spring, and entry "
        "will be free for children in the first summer.",
        "The council will reopen the pool that a storm damaged.",
        "The old pool reopens, free for children at first.",
    ),
    (
        "A ferry with ninety passengers ran aground in fog on Friday evening. Nobody was "
        "hurt. The captain said that the harbour lights had failed; the port authority has "
        "opened an inquiry.",
        "A ferry ran aground in fog, nobody was hurt.",
        "An inquiry will ask why the harbour lights had failed.",
    ),
]

# ---- Reddit TL;DR: how it is told
#
# Attribute -> side -> (beginnings, ends) of a sentence. Each beginning goes with each end.

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

# ---- PRISM, RewardBench 2 and PersonalLLM: conversations with a model

# Conversation type, opening prompt, what every reply to it says.
QUESTIONS = [
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

# A reply has a style as a summary has: attribute -> side -> (beginnings, ends) of a sentence.
REPLY_STYLES = {
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

# ---- RewardBench 2: its subset Ties

# A question with one right answer, that answer; a question with several right answers, these; the
# wrong answers to both.
TIES = [
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
