# Sourced by the scripts that launch/slurm/sbatch.py renders for runs that go on from their checkpoints. OUT is the run's folder,
# JOB what Slurm's commands call the job: its number, or ARRAY_INDEX for a job of an array.
#
# What befalls a job, and what becomes of it:
#   SIGTERM before the time limit    all ranks save and end; the job is requeued
#   ranks, a launcher or a node die  what failed is named; the job is requeued, here or by Slurm
#   Slurm requeues or pre-empts it   noted; it starts again by itself
#   cancelled; a user's mistake      the job ends (exit code 2 is a mistake, see nano3/cli.py)
#   three deaths at one step         the next start says why, and the job ends
# OUT/attempts.tsv has a line for every start and end (event, step, job, restart, nodes, words), OUT/job the number of the
# one job that may write to OUT.

RESTART="${SLURM_RESTART_COUNT:-0}"
MOST_DEATHS=3

fail() { # MESSAGE
    echo "error: $1" >&2
    exit 2
}

note() { # EVENT WORDS
    printf '%s\t' "$1" "$STEP" "$JOB" "$RESTART" "$SLURM_JOB_NODELIST" >> "$OUT/attempts.tsv"
    printf '%s\n' "$2" >> "$OUT/attempts.tsv"
}

lives() { # JOB: whether it is queued or runs; where Slurm does not answer, it may
    local said
    if said="$(squeue --noheader --jobs="$1" --format=%T 2>&1)"; then
        [[ -n $said ]]
    else
        [[ $said != *"Invalid job id"* ]]
    fi
}

# Makes OUT this job's own, or ends the job: of two that write to one OUT, neither would be right.
claim() {
    local owner mine="$OUT/.job.$JOB"
    [[ -d $OUT ]] || fail "no folder $OUT: submit the run again"
    echo "$JOB" > "$mine"
    until ln "$mine" "$OUT/job" 2> /dev/null; do # which only one can do, on any file system
        owner="$(cat "$OUT/job" 2> /dev/null)" || continue
        [[ $owner != "$JOB" ]] || break
        if lives "$owner"; then
            rm -f "$mine"
            fail "job $owner writes to $OUT; wait for it, or end it with: scancel $owner"
        fi
        mv -f "$OUT/job" "$mine.dead"
        [[ $(cat "$mine.dead") == "$owner" ]] || ln "$mine.dead" "$OUT/job" # another job was faster
    done
    rm -f "$mine" "$mine.dead"
}

# Notes the start, and ends the job when too many before it got no further than this one would begin.
begin() {
    local deaths
    STEP="$(ls "$OUT/checkpoints" 2> /dev/null | sed -n 's/^step-0*\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1)" || true
    STEP="${STEP:-0}"
    if ((RESTART > 0)) && [[ -e $OUT/adapter/lora.json ]]; then # however often it died: it has what it was to make
        echo "the run was finished when its job was requeued: $OUT/adapter"
        note begun ""
        finished
        exit 0
    fi
    # The last starts at this step, each with its end: `taken` is no death, and one without an end died without a word.
    deaths="$(awk -F '\t' -v job="$JOB" -v step="$STEP" '
        function close_attempt() { if (open) died[++count] = "  " open ": no word of its end: its first node was lost" }
        $3 != job { next }
        $2 != step { open = ""; count = 0; next }
        $1 == "begun" { close_attempt(); open = "restart " $4 " on " $5 }
        $1 == "ended" { died[++count] = "  restart " $4 " on " $5 ": " $6; open = "" }
        $1 == "taken" { open = "" }
        END { close_attempt(); for (i = 1; i <= count; i++) print died[i] }' "$OUT/attempts.tsv" 2> /dev/null)" || true
    if [[ -n $deaths ]] && (($(wc -l <<< "$deaths") >= MOST_DEATHS)); then
        rm -f "$OUT/job"
        fail "after step $STEP this run died $(wc -l <<< "$deaths") times and got no further:
$deaths
Mend what stands there (the log above has all of it), then give the same command again"
    fi
    note begun ""
}

# Runs a step of the job, whatever signals come meanwhile; when it fails, so does the attempt.
survive() { # srun ARGUMENTS
    local code
    setsid "$@" & # apart from this shell's group: srun would pass a SIGTERM on as SIGKILL
    while :; do
        interrupted="" code=0
        wait $! || code=$?
        [[ -n $interrupted ]] || break
    done
    ((code == 0)) || give_way "$code"
}

runs() { # whether this job does, as far as Slurm says; where Slurm does not answer it is what a script sees: it runs
    local said
    if said="$(squeue --noheader --jobs="$JOB" --format=%T 2>&1)"; then
        said="$(tail -n 1 <<< "$said")" # below a warning
        [[ $said == RUNNING || $said == SIGNALING ]] # the signal that we have may still be on its way to others
    else
        [[ $said != *"Invalid job id"* ]]
    fi
}

# SIGTERM: before the time limit, or because Slurm takes the job. The ranks end their step and save.
asked="" gone=""
terminated() {
    interrupted=yes
    if ! runs; then
        taken
    else
        asked=yes
        echo "SIGTERM: the ranks end their step and save"
        scancel --signal=TERM "$JOB" || true
    fi
}
trap terminated TERM

# Slurm takes the job, has told the ranks itself, and requeues it or not. Noted at once: there may be no time later.
taken() {
    local words
    [[ -z $gone ]] || return 0
    gone=yes
    words="$(lost_nodes)"
    note "$([[ -n $words ]] && echo ended || echo taken)" "Slurm ended it${words:+; $words}"
    echo "Slurm ends this attempt${words:+: $words}"
}

lost_nodes() {
    sinfo --Node --noheader --nodes="$SLURM_JOB_NODELIST" --states=down,fail --format='node %N is %T (%E)' |
        sort -u | paste -sd ';' || true
}

# What failed, in a line: nodes that Slurm gave up; else a rank that no longer answered or did not get on; else the first
# launcher or rank that a signal ended, since the others end with an error of their own then; else what srun names first.
culprit() {
    local words
    words="$(lost_nodes)"
    [[ -n $words ]] || words="$(this_attempt | sed -n -e 's/^error: \(no answer for [^:]*\):.*/\1/p' \
        -e 's/^error: \(rank [0-9]* did not get on .*\)\. All ranks end.*/\1/p' | sed -n 1p)"
    [[ -n $words ]] || words="$(this_attempt | awk '
        said { next }
        / host +: / { host = $NF } / rank +: / { rank = $(NF - 2) }
        / exitcode +: -/ { sub(/.*: -/, ""); print "rank " rank " on " host " ended by signal " $1; said = 1 }
        /^srun: error: .*: (Killed|Segmentation|Bus error|Aborted)/ { sub(/^srun: error: /, ""); print; said = 1 }')"
    [[ -n $words ]] || words="$(this_attempt | sed -n 's/^srun: error: //p' | sed -n 1p)"
    echo "$words"
}

this_attempt() { # what the log has of it; never ends early, or who writes to it would be ended
    tail -c "+$((LOG_BEGINS + 1))" "$LOG" 2> /dev/null || true
}

finished() {
    note finished ""
    rm -f "$OUT/job"
}

# The attempt is over: says why, and has the job requeued where that may help.
give_way() { # EXIT_CODE
    local words
    trap '' TERM
    if ! runs; then
        taken
        exit "$1"
    fi
    words="$(culprit)"
    [[ -z $asked ]] || words="the time limit came"
    note ended "exit code $1; $words"
    echo "this attempt ended with exit code $1: $words"
    if [[ -z $asked ]] && (($1 == 2)); then
        rm -f "$OUT/job"
        exit 2
    fi
    scontrol requeue "$JOB" && echo "requeued: it resumes from the newest checkpoint in $OUT"
    exit "$1"
}

LOG="$(scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p')" || true # then nobody is named
LOG_BEGINS="$(stat -c %s "$LOG" 2> /dev/null || echo 0)"
claim
begin
