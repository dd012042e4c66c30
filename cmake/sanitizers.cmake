# SOCO_SANITIZE="address;undefined" builds the CPU code with those sanitizers, for developers.

set(SOCO_SANITIZE "" CACHE STRING "Sanitizers for the CPU code, such as address;undefined")

function(soco_sanitize target)
  if(SOCO_SANITIZE)
    list(JOIN SOCO_SANITIZE "," list)
    target_compile_options(
      ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${list}>
                        $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>)
    target_link_options(${target} PUBLIC -fsanitize=${list})
  endif()
endfunction()
