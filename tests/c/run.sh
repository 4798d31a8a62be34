#!/bin/bash
# Builds the C core by itself, with gcc and clang, and checks what a Python test cannot: that it
# compiles without a warning, that every kernel is vectorised and none contracts, that a build which
# would change results is refused, and that driver_check is clean under the sanitizers.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY=passive # teams are larger than the machine here; waiting must not cost

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo 'leak:libomp.so' > "$folder/suppressions" # LLVM's OpenMP keeps its threads' records
export LSAN_OPTIONS=suppressions=$folder/suppressions:print_suppressions=0

core=(src_c/{cpu,driver,limit,rules,team}.c)
flags=(-std=c11 -ffp-contract=off -fno-math-errno -Isrc_c)
warnings=(-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
# (What the sanitizers add keeps clang from vectorising, of which it would warn.)
sanitizers=(-O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-pass-failed)

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

# compile COMPILER FOLDER FLAG...: all objects of the core, and driver_check.
compile() {
    local compiler=$1 out=$2 isa
    shift 2
    mkdir -p "$out"
    local tables=()
    for isa in "${isas[@]}"; do
        [[ $isa == base ]] || tables+=("-DFO_HAVE_${isa^^}")
        # shellcheck disable=SC2046 # these are several flags
        "$compiler" "${flags[@]}" "$@" $(isa_flags "$isa") -DFO_ISA="$isa" \
            -c src_c/kernels.c -o "$out/kernels_$isa.o"
    done
    for source in "${core[@]}" tests/c/driver_check.c; do
        "$compiler" "${flags[@]}" "$@" "${tables[@]}" -c "$source" \
            -o "$out/$(basename "$source" .c).o"
    done
}

# check ARGUMENTS COMPILER FLAG...: builds driver_check and runs it with these arguments.
check() {
    local out=$folder/check
    compile "$2" "$out" "${@:3}"
    "$2" "${@:3}" "$out"/*.o -o "$out/driver_check" -lm
    # shellcheck disable=SC2086 # there may be none
    "$out/driver_check" $1
    rm -r "$out"
}

# functions OBJECT: the instructions of each kernel in it, a line "name instruction" each.
functions() {
    objdump -d --no-show-raw-insn "$1" | awk '
        /^[0-9a-f]+ </ { name = substr($2, 2, length($2) - 3) }
        name ~ /_f(32|64)$/ && $1 ~ /:$/ { $1 = ""; print name $0 }'
}

# vectorised OBJECT REGISTER: every kernel but all_finite, which stops at the first value that is not,
# computes in whole vector registers. There is one a rule, variant and type, and three passes a type.
vectorised() {
    local object=$1 register=$2 expected names packed missing
    expected=$(awk -F '[(,)]' '/^FO_RULE/ { n += $3 } END { print 2 * (n + 3) }' src_c/rules.def)
    functions "$object" > "$folder/instructions"
    names=$(cut -d ' ' -f 1 "$folder/instructions" | grep -v '^all_finite' | sort -u)
    packed=$(grep -E " v?(mul|add|sub|div|sqrt)p[sd] .*$register" "$folder/instructions" |
        cut -d ' ' -f 1 | sort -u)
    missing=$(comm -23 <(echo "$names") <(echo "$packed"))
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
    echo "sanitizers, with OpenMP:"
    check "" "$compiler" "${sanitizers[@]}" -fopenmp
done
echo "-- clang: thread sanitizer, the library's own team:"
check own clang -O1 -g -fsanitize=thread -Wno-pass-failed -fopenmp
echo "-- gcc: sanitizers, serial build:"
check "" gcc "${sanitizers[@]}" -Wno-unknown-pragmas

# The same bits on another processor: a serial build for 64-bit Arm, emulated.
plain=("${flags[@]}" -O3 -Wno-unknown-pragmas -DFO_ISA=base)
sources=("${core[@]}" src_c/kernels.c tests/c/driver_check.c)
gcc "${plain[@]}" "${sources[@]}" -o "$folder/here" -lm
aarch64-linux-gnu-gcc -static "${plain[@]}" "${sources[@]}" -o "$folder/arm" -lm
here=$("$folder/here") arm=$(qemu-aarch64 "$folder/arm")
echo "-- aarch64, emulated:"
echo "$arm"
if [[ $(tail -n 1 <<< "$here") != $(tail -n 1 <<< "$arm") ]]; then
    echo "other bits than here: $here"
    exit 1
fi
