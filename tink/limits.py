"""Every limit, with its reason. Bytes, counts and seconds; nothing else in Tink bounds a thing by a
number of its own."""

from __future__ import annotations

# -- requests ---------------------------------------------------------------------------------------

# The SDK splits forward_backward at 5 MB, but sends a single larger datum whole.
MAX_TRAINING_BODY = 64 * 1024 * 1024
# A JSON prompt of 128k tokens is below 1 MB.
MAX_JSON_BODY = 8 * 1024 * 1024
# A training command (all but forward and forward_backward) is kept in its event for ever.
MAX_COMMAND_BODY = 256 * 1024
# A zstd frame may claim any size: what it really yields is counted against MAX_TRAINING_BODY, and the
# window it may ask memory for against this.
MAX_ZSTD_WINDOW = 16 * 1024 * 1024
# Past this many samples a request is a mistake, and its answer would not fit a reply.
MAX_NUM_SAMPLES = 1024
# A (len, k) float matrix per sample: more than this is a vocabulary dump.
MAX_TOPK = 64
# (samples x tokens x k) of one request, in cells of 8 bytes: 32 MiB.
MAX_TOPK_CELLS = 4 * 1024 * 1024
MAX_NAME = 128
MAX_METADATA_BYTES = 16 * 1024
MAX_STOPS = 64

# -- reading requests -------------------------------------------------------------------------------

# How much of a body that cannot be served is looked at for the ids of its job: they lead.
PEEK_BYTES = 64 * 1024
# How much of a body that nobody wants is still taken, so that its sender gets to read the answer: a
# connection closed on a sender is reset, and the answer with it.
DRAIN_BYTES = MAX_TRAINING_BODY
DRAIN_SECONDS = 10.0
# After SIGTERM requests in flight get so long to be answered; polls are told to come again.
STOPPING_SECONDS = 10.0
# The collector of a worker that serves looks for garbage each time that so many objects more are there. At
# Python's 700 it would look through what a thousand samples are waiting in again and again, and take a
# third of the worker's time to find nothing.
COLLECT_OBJECTS = 200_000
# A sender that is silent for so long in the middle of a body is gone.
STALL_SECONDS = 30.0
# A body longer than this, or compressed, is unpacked in a thread: in the loop it would be felt.
INLINE_BYTES = 256 * 1024
# What is unpacked at a time, and counted.
UNPACK_BYTES = 1024 * 1024
# Before the 500 of a bug: clients ask again at once.
BUG_PAUSE = 1.0
MAX_PAGE = 1000
MAX_SEARCH_PAGE = 200
# Exceptions of one telemetry batch that are journaled.
MAX_CLIENT_FAILURES = 8
# A download link of an export.
LINK_SECONDS = 3600
LONGEST_TTL = 10 * 365 * 24 * 3600

# Connections that may wait to be accepted: a client opens hundreds at once.
BACKLOG = 1024
# An idle connection of a client, above the SDK's 45 s for one poll.
KEEP_ALIVE_SECONDS = 75.0
# The first line and the headers of a request.
MAX_HEAD_BYTES = 64 * 1024

# -- promises ---------------------------------------------------------------------------------------

# The SDK gives up on one poll after 45 s; below that, 408 makes it ask again at once.
POLL_HOLD = 20.0
# And of a client of the REST API: below what httpx waits for an answer by itself.
REST_POLL_HOLD = 2.0
# Before a model's tokenizer that could not be had is looked for again.
TEXT_RETRY_SECONDS = 60.0
# Prompts of one sample: each is a job.
MAX_PROMPTS = 256
# Rows and futures in memory, about 2 kB each; beyond it the SDK waits and sends again.
MAX_OPEN_JOBS = 20_000
# Ended jobs kept in memory for the poll that is about to come; older ones come from the database.
RECENT_JOBS = 4096
# Of a sampler: runs of numbers that its jobs have, in memory.
NUMBER_RUNS = 1024
# Of a training job: the lane waits for the number behind it, which a column of 64 bits has to hold.
MAX_SEQ = 2**63 - 2
# Between two looks for sessions, models and samplers in memory that nothing goes back to any more.
FORGET_SECONDS = 60.0
# How long a model's lane waits for a seq_id that never came while later ones are there: a client that is
# cut off sends again for five minutes.
SEQ_GAP_SECONDS = 330.0
# Meanwhile it is looked at so often: a worker that was itself stopped for an hour has missed one look.
GAP_LOOKS = 10

# -- queues -----------------------------------------------------------------------------------------

MAILBOX = 1024
# Group commit: rows and bytes that may wait for the next transaction before append() blocks.
BATCH_ROWS = 1_000
BATCH_BYTES = 4 * 1024 * 1024
BODY_BATCH_BYTES = 64 * 1024 * 1024
# A body up to here is committed with the event that names it: a commit of its own would take as long again,
# and one that is longer would hold the events up. A prompt of 2k tokens, or the answer to it.
SHORT_BODY = 16 * 1024
# Bodies just put, for the backend or client that is about to read them.
BODY_CACHE_BYTES = 64 * 1024 * 1024
READ_CONNECTIONS = 4
# Of each: statements that it keeps prepared, each some 20 kB. Those that name many rows are as many as
# there are numbers of rows, and would fill any cache.
READ_STATEMENTS = 32
# Events at the end of the journal that a start compares with the tables: several of the largest commits.
CHECKED_EVENTS = 5_000
# Keys of one query: every build of SQLite takes so many parameters.
SQL_KEYS = 400
# Events that are taken from SQLite at a time. A call for each would take as long as the reading; and
# Python's garbage collector, which comes after 700 new objects, shall not come for them.
READ_ROWS = 200
# Rows of a whole table that are taken from a database at a time, where each is looked at once.
SCANNED_ROWS = 1_000
# Of each check of a journal: a damaged one has as many problems as it has rows. And characters of each, for
# it may have a whole row in it: in that list, and in an error of one line.
SHOWN_PROBLEMS = 100
PROBLEM_CHARACTERS = 1_000
FIRST_PROBLEM_CHARACTERS = 300
# Bodies that a check holds at once: each may be as large as a request.
CHECKED_BODIES = 4

# Events that `tink db move` and `tink export` copy in one go.
COPY_EVENTS = 2_000
# Pages of a file that `tink db backup` copies in one go: a megabyte or so. And how often it looks for a
# moment at which no body was being deleted.
BACKUP_PAGES = 256
BACKUP_TRIES = 5

# -- tink sql --------------------------------------------------------------------------------------

# One value of an answer, and all of it.
SQL_VALUE_BYTES = 64 * 1024 * 1024
SQL_ANSWER_BYTES = 256 * 1024 * 1024
# What PostgreSQL may put on its disk meanwhile, where Tink may say so.
SQL_SPILL_BYTES = 1024 * 1024 * 1024
# Steps of SQLite's machine between two looks at the clock: a fraction of a millisecond.
SQL_STEPS = 10_000

# -- what is printed --------------------------------------------------------------------------------

# Characters of a cell in a table.
CELL = 120
# The newest jobs, of which `tink status` says where their time went.
STAGES_JOBS = 200
# Of many things that a line tells of together, so many are named there.
NAMED = 3

# -- tink doctor -----------------------------------------------------------------------------------

# With less room than this the next checkpoints may fail; with less than that the journal's next commit.
DISK_FEW_BYTES = 10 * 10**9
DISK_LEAST_BYTES = 10**9
# A clock that is set while the worker runs may go back by a little.
CLOCK_SLACK_SECONDS = 2.0

# -- a database, or a disk, that is slow ----------------------------------------------------------

# Another process has a lock on the database: so long a commit waits for it before the worker stops.
LOCK_SECONDS = 60.0
# And a read, which a worker's writer does not block.
READ_LOCK_SECONDS = 5.0
# To be let in by a PostgreSQL server; for what a reader asks of it; and without a sign of life, after which
# a connection is taken for lost (whole seconds, and even).
DATABASE_CONNECT_SECONDS = 5
DATABASE_READ_SECONDS = 300.0
DATABASE_LOST_SECONDS = 8
# A worker says so often that it is alive, to the server that it writes to; one that waits for its place
# takes it after so long a silence.
DATABASE_BEAT_SECONDS = 1.0
DATABASE_SILENT_SECONDS = 10.0
# For so long a server may take to notice that a connection was closed, and to end one that it is told to.
DATABASE_CLOSED_SECONDS = 1.0
DATABASE_ENDED_SECONDS = 5.0
# Between two looks whether it is one's turn, and before a server that was lost is tried again.
DATABASE_LOOK_SECONDS = 0.5
# A commit that takes longer is told of while it lasts.
SLOW_COMMIT_SECONDS = 10.0

# -- a trainer that does not answer, or answers wrongly ---------------------------------------------

CONNECT_SECONDS = 5.0
# A connection that has been idle for so long may have been closed by the other side.
IDLE_CONNECTION_SECONDS = 30.0
# The kernel asks a silent peer whether it is there after so long, then in such steps, so often: an answer
# may take hours.
TCP_IDLE_SECONDS = 60
TCP_PROBE_SECONDS = 15
TCP_PROBES = 4
# A worker or trainer that has not told a command its state for so long is silent.
STATUS_SECONDS = 3.0
# Health is answered off the training thread: a look that takes longer is a silent process.
HEALTH_SECONDS = 5.0
# Between two looks at a healthy trainer; they also tell it that its worker lives.
BEAT_SECONDS = 2.0
# Between two looks at one that is loading its model.
LOADING_SECONDS = 0.2
# So many silent looks in a row, beside the first one, are a stuck process. They are counted, and not
# timed: a worker that was itself stopped for an hour has missed one.
SILENT_LOOKS = 5
# A call for an operation or a sample asks the trainer to hold it so long, and then is made again.
HOLD_SECONDS = 20.0
# On top of the seconds that a call asks to be held: an answer that comes later is too late.
GRACE_SECONDS = 15.0
# A poll that comes back with nothing sooner than this was not held, and the next one is.
POLL_SECONDS = 1.0
# Writing or reading all of a model's state: gigabytes, on a disk that others use too.
STATE_SECONDS = 600.0
# Above what 1,024 samples of 32k tokens weigh.
MAX_ANSWER = 512 * 1024 * 1024
# Between two calls that failed: the first pause, which doubles, and the longest.
PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
# Between two starts of an actor that crashed, at most; one that ran for so long starts again at once.
LONGEST_ACTOR_PAUSE_SECONDS = 10.0
CALM_SECONDS = 60.0
# Calls of the worker to its trainer beside operations and samples: looks and snapshots.
TRAINER_OWN_SLOTS = 3
# A trainer whose health is well and whose answers to one job are not, so often in a row, is replaced.
WRONG_ANSWERS = 12
# An operation without progress for so long is told of. (TINK_HANG_SECONDS ends it.)
IDLE_SECONDS = 300.0
# A trainer imports torch, from a slow disk, and binds its port within this; the model is loaded after that.
START_SECONDS = 300.0
# A trainer that is told to stop gets so long before it is killed.
STOP_SECONDS = 20.0
# Between two looks at a process that is starting or ending.
PROCESS_LOOK_SECONDS = 0.05

# -- a sampling server ------------------------------------------------------------------------------

# A sample may wait long in a server's queue, and whether the server hangs is told by what it generates:
# this only ends calls whose answer was lost on the way.
COMPLETION_SECONDS = 24 * 3600.0
# What a call of an old TRL may take before it is taken for hung, and for each token beside that.
ANSWER_SECONDS = 600.0
TOKEN_SECONDS = 0.5
# vLLM reads an adapter from a disk that others use too, between two of its steps.
ADAPTER_SECONDS = 120.0
# A sample whose logits are not finite is tried so often: another one may have left them so in the KV cache.
NOT_FINITE_TRIES = 4
# Of what a server says when it refuses something.
MAX_REASON = 400
# Samples that are out at one server. Each may be many sequences: vLLM queues what it cannot batch.
REPLICA_SLOTS = 512
# Calls beside the samples: a look at the server, loading and unloading.
REPLICA_OWN_SLOTS = 4
# Adapters registered at one server at once, but for those in use: a name costs it little, and each is
# loaded again after a restart.
ADAPTERS_REGISTERED = 1000
# `tink vllm`: adapters that vLLM keeps in memory for each that a batch may use; it reads others from disk.
CPU_LORAS_PER_PLACE = 8
# Between two looks at a server that serves.
REPLICA_BEAT_SECONDS = 2.0
# A server that is told to stop gets so long to end what it runs.
REPLICA_DRAIN_SECONDS = 60.0
# Servers that answer no look for so long are away; before, they are in doubt.
REPLICA_SILENT_SECONDS = 30.0
# A server that has requests and generates nothing for so long hangs, or is paused.
REPLICA_STALL_SECONDS = 60.0
# Failures of servers in loading one adapter: those of one go count once, and none for longer than that.
LOAD_ROUND_SECONDS = 4.0
LOAD_FAILURES_SECONDS = 600.0
# One that has aborted a request, and then generates nothing for so long, is paused.
REPLICA_PAUSED_SECONDS = 20.0
# Samples that were out when a server died: so many of them at once at one server, until another one dies.
SUSPECTS_TOGETHER = 16
# Requests that wait for the trainer to score their prompts beside the samples that run; more hold these up.
SCORES_ASIDE = 1024
# Two servers of one base model give the same tokens log-probabilities no further apart, in nats, whatever
# their precision.
BASE_MODEL_NATS = 1.0
# Servers that give a sample up, one after the other, without dying of it: five minutes of them.
SAMPLE_MOVES = 60
# A prompt goes where one with the same first tokens went (so many, twice, four times as many, ...), if that
# server has at most so many sequences more than the least busy one.
AFFINITY_TOKENS = 64
AFFINITY_SLACK = 16
AFFINITIES = 50_000

# -- a plain Megatron-LM text generation server -----------------------------------------------------

# Of prompt and answer together, whatever its model could: what such a server is started with by itself
# (--inference-max-seq-length). It does not tell, and one that is asked for more serves nothing after that.
TEXT_GENERATION_CONTEXT = 2560

# -- trainer ----------------------------------------------------------------------------------------

TRAINER_QUEUE = 256
# An operation that has overtaken the one before it is sent again after so many seconds, and after twice as
# many each time.
OVERTAKEN_SECONDS = 0.02
# Ops of one model that the trainer may hold behind the running one.
TRAINER_AHEAD = 4
MAX_RANK = 512
MAX_OP_WAIT = 30.0
SAMPLE_SLOTS = 2
# Of a text in pieces: tokens that may wait for the end of a character.
MAX_PIECE_TOKENS = 64
# Adapters that are kept for sampling; on a GPU no more than take so many bytes.
ADAPTER_CACHE = 64
ADAPTER_CACHE_BYTES = 4 * 1024**3
# Results of samples are kept this long for the poll that was lost.
SAMPLE_KEEP_SECONDS = 600.0
SAMPLE_KEEP_BYTES = 64 * 1024 * 1024
# Padded tokens that go through the model at once while training, on a CPU: a laptop's caches are warm, and
# an 8B model's activations still fit. On a GPU they are as many as fit, within these bounds: activations
# may take this share of what the weights leave; the rest is for adapters, logits and whoever samples there.
MICRO_BATCH_TOKENS = 4096
MIN_MICRO_BATCH_TOKENS, MAX_MICRO_BATCH_TOKENS = 1024, 65536
ACTIVATION_SHARE = 0.5
# Tokens that are tried at the start, to see what one takes.
PROBE_TOKENS = 256
# Logits (rows x vocabulary) held at once, in cells of 4 bytes and several times over: what stays in caches
# on a CPU, and what keeps a GPU busy.
LOGIT_CELLS = {"cpu": 16 * 1024 * 1024, "cuda": 256 * 1024 * 1024}
# Continuations of one prompt that are generated at once; more go in further waves.
SAMPLE_ROWS = 64
# Results of one model that wait to be acknowledged. A worker acks with each op, so that more than
# this means it does not, and the trainer's memory would only grow.
TRAINER_KEPT = 256
# Removed models whose op numbers are still known, to answer a repeat: more than a worker has under way.
TRAINER_TOMBSTONES = 1024
# How long a process of a model that is in slices waits in a collective for the others before it takes them
# for hung: a collective is small, but a rank may come late to it, after a file that only it has to read.
COLLECTIVE_SECONDS = 300.0
# How long it waits to be told what to do: as long as it takes.
RANK_IDLE_SECONDS = 365 * 24 * 3600.0
# What such processes compare after each call: the hash of its result, or the beginning of an error.
DIGEST_BYTES = 512
# Of an operation that waits for another one's end on such a model, between two signs of life.
TURN_BEAT_SECONDS = 1.0
# How long a stopping trainer waits for the ops that run, and then for the answers of what just ended.
TRAINER_GRACE = 10.0
TRAINER_LAST_SECONDS = 1.0
# A worker keeps its connections; closing an idle one would race with its next call.
TRAINER_KEEP_ALIVE_SECONDS = 3600.0
# A trainer that no worker calls notices it in so many parts of the time: one that was itself stopped for an
# hour has missed the calls of one of them.
ORPHAN_LOOKS = 10
# Trainers that were killed so soon, one after the other: another would be killed as well, and whoever
# started their parent shall decide.
SHORT_LIVES = 3
SHORT_LIFE_SECONDS = 1.0
# The SDK's body plus the envelope around it.
MAX_TRAINER_BODY = MAX_TRAINING_BODY + 64 * 1024

# -- tink replay ------------------------------------------------------------------------------------

# How hard a bundle is compressed.
BUNDLE_LEVEL = 10
# Of each table: a long screen.
STATE_ROWS = 50
# A time that a worker made of its clock, before its commit, from one that is made of the commit's time.
REPLAY_CLOCK_SECONDS = 60.0
# Pauses between two events are gone through up to here: nothing in a worker waits longer for its clients.
REPLAY_PAUSE_SECONDS = 2 * SEQ_GAP_SECONDS
# Operations of a replay that are out at once: what comes next is at the trainer when its turn comes, as far
# as one will queue.
REPLAY_AHEAD = TRAINER_AHEAD
# The trainer of a replay that was itself killed ends by itself.
REPLAY_ORPHAN_SECONDS = 120
# Of the results that differ, so many are printed; --compare prints all.
REPLAY_SHOWN = 10
# The worker reads the files of a fork before it publishes them.
FORK_SECONDS = 120.0
# What a fork that was killed has left in the scratch folder is taken for such after so long.
FORK_LEFT_SECONDS = 24 * 3600.0

# -- metrics ----------------------------------------------------------------------------------------

# Upper bounds of a histogram's buckets: from one small optimizer step to a long batch of long rollouts.
RUN_SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# From the commits between two operations to a pause for people.
IDLE_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0)

# -- retention --------------------------------------------------------------------------------------

# Between two passes over everything, and between two looks for checkpoints that have come to an end.
RETENTION_SECONDS = 3600.0
EXPIRY_SECONDS = 60.0
# However short TINK_KEEP_RESULTS_HOURS and TINK_KEEP_ADAPTERS_HOURS are: how long a result stays for the
# poll that was lost, and a sampler's weights for the client that has just saved them.
LEAST_KEPT_SECONDS = 3600.0
# Bodies that are deleted in one transaction: their writer is held for milliseconds.
PRUNE_ROWS = 256
# Of the short ones, in one commit: the events behind it wait for a few milliseconds.
PRUNE_SHORT_ROWS = 32
PRUNE_BYTES = 16 * 1024 * 1024
# Of each model. Two, for a snapshot that was damaged on disk is found out when it is needed.
SNAPSHOTS_KEPT = 2
