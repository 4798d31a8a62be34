#!/bin/bash
# Builds the C core by itself, with gcc and clang, and checks what a Python test cannot: that it
# compiles without a warning, that every kernel is vectorised and none contracts, that a build which
# would change results is refused, that the checks and the example in C are clean under the
# sanitizers, that other compilers and processors give the same bits, and that C++ takes the public
# header.
#
#     tests/c/run.sh [--all]
#
# What is slow, sanitized or emulated, runs a few configurations, and has the loops of one instruction
# set. With --all it is all configurations and sets, gcc's sanitizers with OpenMP, and valgrind.
set -euo pipefail
all=${1:-} few=few
[[ $all == '' || $all == --all ]] || { echo "unknown argument: $1" >&2; exit 2; }
[[ -z $all ]] || few=''
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY=passive # teams are larger than the machine here; waiting must not cost

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo 'leak:libomp.so' > "$folder/suppressions" # LLVM's OpenMP keeps its threads' records
export LSAN_OPTIONS=suppressions=$folder/suppressions:print_suppressions=0

core=(src_c/{api,bandwidth,coded,gradient,machine,missed,plan,reduce,region,rows,rules,step,storage,team,update}.c)
flags=(-std=c11 -ffp-contract=off -fno-math-errno -Isrc_c -Ifastopt/include)
warnings=(-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
# (What the sanitizers add keeps clang from vectorising, of which it would warn.)
sanitizers=(-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-pass-failed)

isas=(base)
if echo | gcc -mavx512f -x c -c - -o /dev/null 2> /dev/null; then
    isas+=(avx2 avx512)
fi

isa_flags() {
    case $1 in
        avx2) echo -mavx2 ;;
        avx512) echo -mavx512f -mavx512vl -mavx512dq -mavx512bw -mprefer-vector-width=512 ;;
    esac
}

# compile COMPILER FOLDER FLAG...: all objects of the core, and of the checks (in FOLDER/checks). What
# is in `of_loops` is for the loops alone.
of_loops=()
compile() {
    local compiler=$1 out=$2 isa
    shift 2
    mkdir -p "$out/checks"
    local tables=()
    for isa in "${isas[@]}"; do
        [[ $isa == base ]] || tables+=("-DFO_HAVE_${isa^^}")
        # shellcheck disable=SC2046 # these are several flags
        "$compiler" "${flags[@]}" "$@" "${of_loops[@]}" $(isa_flags "$isa") -DFO_ISA="$isa" \
            -c src_c/kernels.c -o "$out/kernels_$isa.o"
    done
    for source in "${core[@]}"; do
        "$compiler" "${flags[@]}" "$@" "${tables[@]}" -c "$source" \
            -o "$out/$(basename "$source" .c).o"
    done
    for source in tests/c/*_check.c examples/c_program/train.c; do
        "$compiler" "${flags[@]}" "$@" -c "$source" -o "$out/checks/$(basename "$source" .c).o"
    done
}

# programs COMPILER FOLDER FLAG...: links the checks to what was compiled there.
programs() {
    local out=$2 name wrap
    for name in driver_check storage_check rows_check parts_check edge_check team_check train; do
        case $name in
            storage_check) wrap=-Wl,--wrap=fo_active_table ;;
            edge_check) wrap=-Wl,--wrap=calloc ;;
            team_check) wrap=-Wl,--wrap=pthread_create ;;
            *) wrap= ;;
        esac
        # shellcheck disable=SC2086 # there may be none
        "$1" "${@:3}" $wrap "$out"/*.o "$out/checks/$name.o" -o "$out/$name" -lm
    done
}

# digests "EMULATOR" FOLDER "ARGUMENTS": runs the checks that print a digest.
digests() {
    local name
    for name in driver_check storage_check rows_check parts_check; do
        # shellcheck disable=SC2086 # these are several words, or none
        $1 "$2/$name" $3 || return
    done
}

# same_digests WHAT HERE: whether what was printed has the digests of what was printed here.
same_digests() {
    if [[ $(grep -c '^digest' <<< "$2") != 4 || $(grep '^digest' <<< "$1") != $(grep '^digest' <<< "$2") ]]; then
        echo "other bits than here: $2"
        return 1
    fi
}

# check ARGUMENTS COMPILER FLAG...: builds the checks and the example and runs them, those with a digest
# with these arguments.
check() {
    local out=$folder/check isas=("${isas[@]}")
    [[ $all ]] || isas=(base)
    compile "$2" "$out" "${@:3}"
    programs "$2" "$out" "${@:3}"
    digests "" "$out" "$1"
    "$out/edge_check"
    "$out/train" | tail -n 1
    ASAN_OPTIONS=detect_leaks=0 "$out/team_check" 1 5 # it forks, and children leave threads behind
    rm -r "$out"
}

# uncovered FOLDER FILE...: the lines of these files (names without a folder) that the runs of the
# objects there did not reach, or where they took only some of the ways that a branch has.
uncovered() {
    (
        ln -s "$PWD/src_c" "$PWD/tests" "$1"
        cd "$1"
        gcov --branch-probabilities ./*.o > /dev/null
        gcov --branch-probabilities checks/edge_check.o > /dev/null # which has tuner.h to itself
        for file in "${@:2}"; do
            awk -v file="$file" '
                /^ *[^:]+: *[0-9]+:/ { line = $0 }
                /^ *#####:/ || /^branch .*(taken 0%|never executed)/ {
                    if (line != printed) print file ": " line
                    printed = line
                }
                /^branch/ { seen++ }
                END { if (!seen) print file ": no branch was seen" }' "$file.gcov"
        done
    )
}

# functions OBJECT: the instructions of each kernel in it, a line "name instruction" each.
functions() {
    objdump -d --no-show-raw-insn "$1" | awk '
        /^[0-9a-f]+ </ { name = substr($2, 2, length($2) - 3) }
        name ~ /_(f32|f64|bf16)$/ && $1 ~ /:$/ { $1 = ""; print name $0 }'
}

# vectorised OBJECT REGISTER: every kernel but all_finite, which stops at the first value that is not,
# computes in whole vector registers. There is one a rule, variant and type, one a rule, variant and
# line of FO_EACH_FUSED, and five passes a type. (SGD without momentum has no state whose type would
# matter, nor have the loops of row-wise Adagrad, so gcc lets one of them jump to another.)
vectorised() {
    local object=$1 register=$2 expected names packed missing
    expected=$(awk -F '[(,)]' -v fused="$(grep -c '^    X(' src_c/kernels.h)" \
        '/^FO_RULE/ { n += $3 } END { print 2 * (n + 5) + fused * n }' src_c/rules.def)
    functions "$object" > "$folder/instructions"
    names=$(cut -d ' ' -f 1 "$folder/instructions" | grep -v '^all_finite' | sort -u)
    packed=$(grep -E " v?(mul|add|sub|div|sqrt)p[sd] .*$register" "$folder/instructions" |
        cut -d ' ' -f 1 | sort -u)
    missing=$(comm -23 <(echo "$names") <(echo "$packed") | grep -vxE '(sgd_0|adagrad_1)_bf16_f32' || true)
    if [[ -n $missing || $(wc -l <<< "$names") -ne $expected ]]; then
        echo "$object: $(wc -l <<< "$names") of $expected kernels found; not vectorised: $missing"
        return 1
    fi
    if grep -E ' vfn?m(add|sub)' "$folder/instructions"; then
        echo "$object: contracted"
        return 1
    fi
    echo "$(basename "$object" .o): $expected kernels vectorised, none contracted"
}

for compiler in gcc clang; do
    echo "-- $compiler: $("$compiler" --version | head -n 1)"
    for openmp in -fopenmp -Wno-unknown-pragmas; do
        compile "$compiler" "$folder/warnings" -O3 "${warnings[@]}" "$openmp"
    done
    for standard in c++98 c++11 c++20; do
        echo '#include "fastopt.h"' | "$compiler" -x c++ -std=$standard "${warnings[@]}" \
            -Ifastopt/include -fsyntax-only -
    done
    echo "no warnings"
    if [[ $(uname -m) == x86_64 ]]; then
        vectorised "$folder/warnings/kernels_base.o" xmm
        vectorised "$folder/warnings/kernels_avx2.o" ymm
        vectorised "$folder/warnings/kernels_avx512.o" zmm
    fi
    for refused in -ffast-math -Ofast; do
        if "$compiler" "${flags[@]}" -O3 $refused -DFO_ISA=base -c src_c/kernels.c \
            -o /dev/null 2> /dev/null; then
            echo "a build with $refused is not refused"
            exit 1
        fi
    done
    echo "fast math refused"
    if [[ $all || $compiler == clang ]]; then
        echo "sanitizers, with OpenMP:"
        check "$few" "$compiler" "${sanitizers[@]}" -fopenmp
    fi
done
echo "-- clang: thread sanitizer, the library's own team:"
(
    export TSAN_OPTIONS=die_after_fork=0:ignore_noninstrumented_modules=1
    check "own $few" clang -O1 -g -fsanitize=thread -Wno-pass-failed -fopenmp
)
echo "-- gcc: sanitizers, without OpenMP, with a type of elements that is for tests:"
check "$few" gcc "${sanitizers[@]}" -Wno-unknown-pragmas -DFO_TEST_STORAGE

# The command by which docs/c-api.md builds a program from the sources.
bash -euc "$(sed -n '/^cc -std=c11/,/^```/{/^```/!p}' docs/c-api.md) -o $folder/train"
"$folder/train" | tail -n 1

# The same bits from every compiler, and on other processors: builds without OpenMP, emulated where
# need be.
plain=("${flags[@]}" -O3 -Wno-unknown-pragmas -DFO_ISA=base)

# build FOLDER COMPILER FLAG...: builds the checks that print a digest.
build() {
    local source
    mkdir -p "$1"
    for source in "${core[@]}" src_c/kernels.c; do
        "${@:2}" "${plain[@]}" -c "$source" -o "$1/$(basename "$source" .c).o"
    done
    "${@:2}" "${plain[@]}" tests/c/driver_check.c "$1"/*.o -o "$1/driver_check" -lm
    "${@:2}" "${plain[@]}" tests/c/storage_check.c "$1"/*.o -Wl,--wrap=fo_active_table \
        -o "$1/storage_check" -lm
    "${@:2}" "${plain[@]}" tests/c/rows_check.c "$1"/*.o -o "$1/rows_check" -lm
    "${@:2}" "${plain[@]}" tests/c/parts_check.c "$1"/*.o -o "$1/parts_check" -lm
}
build "$folder/here" gcc
digests "" "$folder/here" "" # all configurations, with any number of threads, layout and rounding mode
here=$(digests "" "$folder/here" "digest $few")

# other_build NAME "EMULATOR" COMPILER FLAG...: has the digests of `here`.
other_build() {
    local there
    build "$folder/there" "${@:3}"
    there=$(digests "$2" "$folder/there" "digest $few")
    printf '%s\n' "-- $1:" "$there"
    same_digests "$there" "$here"
}
arm32=(-static -march=armv7-a -mfpu=neon)
other_build "clang" "" clang
other_build "64-bit Arm, emulated" qemu-aarch64 aarch64-linux-gnu-gcc -static
[[ -z $all ]] || digests qemu-aarch64 "$folder/there" few
other_build "32-bit Arm, emulated" qemu-arm arm-linux-gnueabihf-gcc "${arm32[@]}"
other_build "32-bit Arm, clang, emulated" qemu-arm \
    clang --target=arm-linux-gnueabihf "${arm32[@]}"

if [[ $(uname -m) == x86_64 ]]; then
    # Here, and on an emulated processor of 2008: the same bits, and together every line and branch.
    of_loops=(-O2 -fno-profile-arcs -fno-test-coverage)
    compile gcc "$folder/coverage" -O0 -g -fopenmp -DFO_TEST_STORAGE '-DFO_INLINE=static inline' \
        --coverage
    of_loops=()
    programs gcc "$folder/coverage" -fopenmp --coverage
    cd "$folder/coverage"
    here=$(digests "" . few)
    old=$(digests "qemu-x86_64 -cpu Nehalem" . "digest few")
    printf '%s\n' "-- x86-64 without AVX, emulated:" "$old"
    same_digests "$old" "$here"
    ./edge_check
    ./team_check 1 5
    qemu-x86_64 -cpu Nehalem ./edge_check
    cd - > /dev/null
    files=({bandwidth,coded,gradient,machine,missed,plan,reduce,rows,rules,step,team,update}.c tuner.h)
    # But for a job that comes in the nanoseconds between a worker's last look and its sleep, which
    # some runs see and some do not.
    missed=$(uncovered "$folder/coverage" "${files[@]}" | grep -v 'team.c:.* if (!is_news(' || true)
    if [[ -n $missed ]]; then
        printf '%s\n' "not reached:" "$missed"
        exit 1
    fi
    echo "-- coverage: every line and branch of ${files[*]}"
fi

if [[ $all ]]; then
    echo "-- valgrind:"
    compile gcc "$folder/valgrind" -O2 -g -fopenmp
    programs gcc "$folder/valgrind" -fopenmp
    memcheck=(valgrind --quiet --error-exitcode=1 --leak-check=full
        --show-leak-kinds=definite --errors-for-leak-kinds=definite)
    digests "${memcheck[*]}" "$folder/valgrind" "own few"
    "${memcheck[@]}" "$folder/valgrind/edge_check"
    "${memcheck[@]}" "$folder/valgrind/team_check" 1 2
fi
