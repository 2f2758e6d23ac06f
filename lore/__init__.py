"""What surrounds the method of utils.py, a file for each subject.

A module imports only utils.py and modules above it in this list.

    words             counts in words
    pickles           pickles of others, read without running code
    files             whole files, JSON, safetensors, torch.save, checkpoints of trainings
    data_files        the data files in a folder, and of which split each is
    rows              rows of other people's files, and the messages in them
    normal_forms      one form for ids, texts and answers that come in several
    data_notes        what is odd in data, a line each
    conversations     conversations as the token ids that the reward model reads
    checkpoint        what a checkpoint folder holds, and which of its files are read
    reward_model      the frozen reward model: reward head, tokenizer, identity
    basis             a learned basis, and whether it is of this reward model
    prefix_attention  the forward pass of a batch, as padded rows or with shared beginnings
    batching          sequences in batches through the model, shard by shard
    batching_trial    the trial on the model that chooses the batching
    embedding         phi(prompt, response), and the cache of finished embeddings
    embedding_files   files of embeddings, and the reward head beside them
    study             what every data set returns: people, their pairs, what is known of both
    intervals         intervals over users, and tests of differences
    leaks             test pairs that the training repeats
    controls          what is reached without knowing the user, and by a model per user
    verdict           "yes", "no" or "undecided", and why, in sentences
    evidence          pairs held out, what the basis looks like, and all of the above together
    reading           what each direction prefers, and who weighs it
    tables            results as tables of text
    report            report.md
    report_directions what the directions mean, a section of report.md
    pictures          accuracy by rank, personal part, and other curves
    questions         new users: their weights from a few choices, and what to ask them next
    html_report       report.html: report.md as one page, its pictures inside
    results           the files in results/
    export            a checkpoint with a user's reward, for servers and trainers
    rewards           a user's reward as a function, for trainers; what a group chooses
    standin           the demo's reward model
    scripts           the command line and the main steps of the data sets' scripts
"""
