"""The worker's own code, put before what a journal says that it was asked and answered: where would it act
otherwise today?

Router, MegatronActor and SamplerActor are the real ones. In place of the journal, the servers and the
clients they have the record: each decision is made anew from the state that the recorded events make up to
it, and is compared with the one that was journaled. What was journaled then holds, so that one difference
is one, and not the beginning of many."""
